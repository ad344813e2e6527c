"""Which cores the ranks of a CPU server are bound to."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.plans import fleet, model_folder
from torchrl_sglang.launch.cores import binding, divide_cores, usable_cores


@pytest.fixture
def model(tmp_path: Path) -> str:
    return model_folder(tmp_path / "model")


@pytest.mark.parametrize(
    ("num_cores", "num_replicas", "num_ranks", "expected"),
    [
        (1, 1, 1, ["0"]),
        (2, 1, 1, ["0"]),
        (2, 1, 2, ["0|1"]),
        (2, 2, 1, ["0", "1"]),
        (2, 2, 2, ["0|1", "0|1"]),
        (2, 1, 3, ["0|1|0"]),
        (1, 2, 2, ["0|0", "0|0"]),
        (4, 2, 2, ["0|1", "2|3"]),
        (4, 8, 1, ["0", "1", "2", "3"] * 2),
        (9, 1, 1, ["0,1,2,3,4,5,6,7"]),
        (9, 1, 2, ["0,1,2,3|4,5,6,7"]),
        (9, 2, 2, ["0,1|2,3", "4,5|6,7"]),
        (9, 3, 1, ["0,1", "2,3", "4,5"]),
    ],
)
def test_cores_are_divided_among_the_ranks_of_cpu_servers(
    num_cores: int, num_replicas: int, num_ranks: int, expected: list[str]
) -> None:
    divided = divide_cores(range(num_cores), num_replicas, num_ranks)
    assert [binding(ranks) for ranks in divided] == expected


@pytest.mark.parametrize(
    ("allowed", "siblings", "nodes", "expected"),
    [
        ({0, 1}, {}, {}, (0, 1)),
        ({0, 1, 2, 3}, {0: "0,2", 2: "0,2", 1: "1,3", 3: "1,3"}, {}, (0, 1)),
        ({1, 2, 3}, {0: "0,2", 2: "0,2", 1: "1,3", 3: "1,3"}, {}, (1, 2)),
        ({0, 1, 2, 3}, {}, {0: 0, 2: 0, 1: 1, 3: 1}, (0, 2, 1, 3)),
        ({5, 7}, {5: "5", 7: "7"}, {5: 1, 7: 0}, (7, 5)),
    ],
)
def test_cores_that_compute(
    tmp_path: Path,
    allowed: set[int],
    siblings: dict[int, str],
    nodes: dict[int, int],
    expected: tuple[int, ...],
) -> None:
    """Not two of one physical core; those of a node beside each other."""
    for core in allowed:
        (tmp_path / f"cpu{core}/topology").mkdir(parents=True)
    for core in siblings.keys() & allowed:
        path = tmp_path / f"cpu{core}/topology/thread_siblings_list"
        path.write_text(siblings[core] + "\n")
    for core, node in nodes.items():
        (tmp_path / f"cpu{core}/node{node}").mkdir()
    assert usable_cores(allowed, tmp_path) == expected
    assert usable_cores(allowed, tmp_path / "nowhere") == tuple(sorted(allowed))


@pytest.mark.parametrize(
    ("sizes", "num_replicas", "threads", "bound"),
    [
        ({}, 1, 2, [None]),
        ({}, 2, 1, ["0", "1"]),
        ({"tp_size": 2}, 1, 1, ["0|1"]),
        ({"dp_size": 2}, 1, 1, ["0|1"]),
        ({"tp_size": 2, "dp_size": 2}, 1, 1, ["0|1|2|0"]),
        ({"tp_size": 2, "pp_size": 2, "ep_size": 2}, 1, 1, ["0|1|2|0"]),
    ],
)
def test_which_starts_bind_their_ranks(
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    sizes: dict[str, int],
    num_replicas: int,
    threads: int,
    bound: list[str | None],
) -> None:
    """SGLang gives each rank a whole NUMA node, and ends where there are too few of them."""
    monkeypatch.setattr("torchrl_sglang.launch.plan.usable_cores", lambda allowed: (0, 1, 2))
    planned = fleet(model, num_replicas=num_replicas, server={"device": "cpu", **sizes})
    assert [config.cpu_threads for config in planned] == [threads] * num_replicas
    assert [config.cpu_cores and binding(config.cpu_cores) for config in planned] == bound
