#!/usr/bin/env bash
# Runs the tests that talk to a server against every release of SGLang that the library supports.
# The server runs in an environment of its own, without this package and without TorchRL; tests and
# trainer stay in .venv. Each environment is made once, in outputs/versions (about 3 GB), and made
# anew when its pins change.
#
#     tools/test_versions.sh [pytest arguments]
#
# Variables: VERSIONS, the releases (default: all), and TORCH_INDEX, as for `make env`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# What runs: the files whose tests talk to a server started with CPU_SERVER_ARGS of
# test/llm/helpers/servers.py. A test of what an old server lacks says so itself, with `needs` from
# there. Not served/weights/adapters: 0.5.20 can wait for ever to unload an adapter, which these
# tests do after each push (`test_every_way_to_generate` is followed by a typed error after its
# bound).
TESTS=(
    served/generate/test_abort.py
    served/generate/test_generate.py
    served/generate/test_lora.py
    served/generate/test_many_at_once.py
    served/generate/test_one_by_one.py
    served/generate/test_openai.py
    served/generate/test_paused_servers.py
    served/generate/test_processors.py
    served/generate/test_retries.py
    served/generate/test_sampling_options.py
    served/generate/test_sessions.py
    served/generate/test_vocabulary.py
    served/policy/test_arguments.py
    served/policy/test_batching.py
    served/policy/test_extras.py
    served/policy/test_log_probs.py
    served/policy/test_media.py
    served/policy/test_modes_and_layouts.py
    served/policy/test_resuming.py
    served/policy/test_rows.py
    served/policy/test_samples.py
    served/policy/test_scoring.py
    served/policy/test_turns.py
    served/policy/test_turns_and_templates.py
    served/policy/test_without_a_tokenizer.py
    served/service/test_attach.py
    served/service/test_replicas.py
    served/service/test_service.py
    served/sync/test_collectors.py
    served/weights/test_arrives.py
    served/weights/test_beside_requests.py
    served/weights/test_in_flight.py
    served/weights/test_options.py
    served/weights/test_other_forms.py
    served/weights/test_parts.py
    served/weights/test_refused.py
    served/weights/test_ways.py
    served/weights/test_ways_that_fail.py
    unit/policy/test_media.py
    whole/test_parity.py
    whole/test_properties.py
)

# The oldest supported one, some between (0.5.21 is the first with update sessions), and the one that
# .venv has.
IN_VENV=$(sed -n 's/^sglang==//p' requirements/sglang-cpu.txt)
VERSIONS=${VERSIONS:-0.5.15.post1 0.5.17 0.5.20 0.5.21 0.5.22 $IN_VENV}

# What a release asks for other than requirements/engine-cpu.txt. The rest of that list fits all.
pins_of() {
    echo openai==2.6.1
    case $1 in
    0.5.22*) return ;;
    0.5.21*) echo xgrammar==0.2.7 ;;
    *) echo xgrammar==0.2.1 ;;
    esac
    echo transformers==5.12.1 tokenizers==0.22.2
    case $1 in
    0.5.15*) echo llguidance==0.7.30 ;;
    esac
}

# The trainer's part of that list.
NOT_ENGINE='accelerate|hoptorch|pyvers|tensordict|torchrl'

unset VIRTUAL_ENV CONDA_PREFIX PYTHONHOME PYTHONPATH PIP_PREFIX PIP_TARGET
export PIP_USER=0

# make_engine VERSION FOLDER: an environment with that release in FOLDER/.venv, unless it is there.
make_engine() {
    local version=$1 folder=$2 names pip pins
    mkdir -p "$folder"
    read -ra pins <<<"$(pins_of "$version" | tr '\n' ' ')"
    names=$(printf '%s|' "${pins[@]%%==*}")
    {
        grep -vE "^(#|(${names}${NOT_ENGINE})==)" requirements/engine-cpu.txt
        printf '%s\n' "${pins[@]}"
    } >"$folder/requirements.txt.new"
    if cmp -s "$folder/requirements.txt.new" "$folder/.venv/.complete"; then
        return
    fi
    mv "$folder/requirements.txt.new" "$folder/requirements.txt"
    rm -rf "$folder/.venv"
    .venv/bin/python -m venv "$folder/.venv"
    pip=("$folder/.venv/bin/python" -m pip --disable-pip-version-check --no-input
        install --quiet --only-binary=:all:)
    "${pip[@]}" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r "$folder/requirements.txt"
    "${pip[@]}" --no-deps "sglang==$version"
    cp "$folder/requirements.txt" "$folder/.venv/.complete" # last: without it, it is not whole
}

# run_tests VERSION FOLDER [pytest arguments]
run_tests() {
    local version=$1 folder=$2 python=$PWD/.venv/bin/python
    shift 2
    mkdir -p "$folder"
    rm -f "$folder/pytest.log"
    if [[ $version != "$IN_VENV" ]]; then
        make_engine "$version" "$folder"
        python=$PWD/$folder/.venv/bin/python
    fi
    TORCHRL_SGLANG_TEST_SERVER_PYTHON=$python .venv/bin/python -m pytest -m 'not faults' \
        "${TESTS[@]/#/test/llm/}" "$@" 2>&1 | tee "$folder/pytest.log"
}

summary="" failed=0
for version in $VERSIONS; do
    printf '\n=== SGLang %s\n' "$version"
    started=$SECONDS folder=outputs/versions/$version
    # Not in an `if`, in which errexit would be off.
    set +e
    (
        set -e
        run_tests "$version" "$folder" "$@"
    )
    code=$?
    set -e
    ((code == 0)) || failed=1
    outcome=$(tail -n 1 "$folder/pytest.log" 2>/dev/null) || outcome="no test ran"
    summary+=$(printf '%-14s %5d s  exit %d  %s' \
        "$version" "$((SECONDS - started))" "$code" "$outcome")$'\n'
done
printf '\n=== SGLang\n%s' "$summary"
exit "$failed"
