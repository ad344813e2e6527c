"""The services of this process, so that a URL alone finds the one that it belongs to."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from .client import normalise_url
from .gate import ServiceState

if TYPE_CHECKING:
    from .service import AsyncSGLang

_services: list[weakref.ref[AsyncSGLang]] = []


def remember(service: AsyncSGLang) -> None:
    """Lets `find_service` find ``service`` for as long as it lives."""
    _services[:] = [known for known in _services if known() is not None]
    _services.append(weakref.ref(service))


def find_service(
    url: str, *, api_key: str | None = None, admin_api_key: str | None = None
) -> AsyncSGLang | None:
    """The service of this process that uses ``url``: one that started its servers, if there is one.

    A service made anew would not hold the requests of the one that is there while weights change,
    and would not know the random keys of servers that it started.

    Args:
        url: URL of a router or server.
        api_key: must be the service's, if given.
        admin_api_key: likewise.
    """
    url = normalise_url(url)
    found = [
        service
        for known in list(_services)
        if (service := known()) is not None
        and normalise_url(service._url) == url
        and api_key in (None, service._keys.api_key)
        and admin_api_key in (None, service._keys.admin_api_key)
        and service.state is not ServiceState.CLOSED
    ]
    managed = [service for service in found if service.log_dir is not None]
    return next(iter(managed or found), None)
