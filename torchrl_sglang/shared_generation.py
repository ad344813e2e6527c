"""Requests of several callers in one batch: what fails, fails alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .errors import ConfigError, EmptyBatchError, InputError, SGLangError
from .generation import GeneratingModel
from .parsing import Group
from .protocol import GenerateRequest
from .requests_in import requests_of
from .seeds import own_seeds


class SharedGeneration(GeneratingModel):
    """Generates for callers that know nothing of each other."""

    def complete_each(
        self,
        batch: Sequence[GenerateRequest],
        positions: Sequence[int] | None = None,
        arrive: Callable[[int, Group], None] | None = None,
    ) -> list[Group]:
        """Same as `complete`, but a request that fails leaves the others alone.

        That goes for what the servers refuse or fail at, for a session that is closed or busy, for
        an adapter that is gone, and for what is not answered in time.

        Args:
            batch: requests of one or several callers.
            positions: each request's index in its caller's own batch, which its error names; the
                seeds are then those of that batch, and stay (see `own_seeds`).
            arrive: called with a request's index and what it came to, as soon as that is known, on
                the event loop that the others wait on: it must be quick.

        Returns:
            For each request its completions, or its error.

        Raises:
            EmptyBatchError: the batch has no request.
            ServiceError: what concerns all requests: the service is broken or closed, or the
                weights did not become whole in time.
        """
        batch = requests_of(batch)
        if positions is None:
            batch = own_seeds(batch)
        places = range(len(batch)) if positions is None else positions
        groups: dict[int, Group] = {}
        with self.sessions.turns(batch) as turns:

            def end(index: int, group: Group) -> None:
                groups[index] = turns.end(index, group)
                if arrive is not None:
                    arrive(index, groups[index])

            for index, error in (self._refused(batch, places) | turns.refused).items():
                end(index, error)
            left = [index for index in range(len(batch)) if index not in groups]
            if left:
                prepared = replace(
                    self._admitted([batch[index] for index in left]),
                    positions=[places[index] for index in left],
                )
                loop, data = self._data_plane()
                loop.run(data.generate_each(prepared, lambda i, group: end(left[i], group)))
        return [groups[index] for index in range(len(batch))]

    def _refused(
        self, batch: Sequence[GenerateRequest], places: Sequence[int]
    ) -> dict[int, SGLangError]:
        """Why requests can't be served, by index; all were served when their callers checked."""
        try:
            self.check(batch)
            return {}
        except EmptyBatchError:
            raise
        except (ConfigError, InputError):
            refused: dict[int, SGLangError] = {}
        for index, request in enumerate(batch):
            try:
                self.check([request])
            except (ConfigError, InputError) as error:
                error.add_note(f"prompt {places[index]} of the batch")
                refused[index] = error
        return refused
