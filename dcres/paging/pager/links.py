"""Where a pager may have pages: sub hosts and, during a lazy restore, part servers."""

from __future__ import annotations

import numpy as np

from dcres.errors import PagingError
from dcres.model.placement import Owners
from dcres.paging.settings import PagerSettings, SubAddress
from dcres.paging.transport.link import Link, LinkUser
from dcres.paging.transport.loop import Loop


class Links:
    """One link to each, as the settings have them."""

    def __init__(self, loop: Loop, settings: PagerSettings, user: LinkUser) -> None:
        self._loop = loop
        self._user = user
        self.subs: list[Link] = []
        self.sources: list[Link] = []
        self.take(settings)

    @property
    def all(self) -> list[Link]:
        """Sub hosts, then part servers."""
        return [*self.subs, *self.sources]

    def require_none_needed(self, settings: PagerSettings, owners: Owners) -> None:
        """Raises PagingError if pages are still with a host that these settings leave out."""
        counts = np.bincount(owners, minlength=256)
        staying = {each.code for each in (*settings.subs, *settings.sources)}
        for link in self.all:
            if link.code not in staying and (counts[link.code] or link.needed):
                raise PagingError(f"{link.sub.host} still has pages of this VM")

    def take(self, settings: PagerSettings) -> None:
        """Keep the links that there are, make those that are new, and end the others."""
        self._settings = settings
        known = {link.code: link for link in self.all}
        self.subs = [self._kept_or_new(known, sub) for sub in settings.subs]
        self.sources = [self._kept_or_new(known, each, source=True) for each in settings.sources]
        for code in known.keys() - {link.code for link in self.all}:
            known[code].close()

    def _kept_or_new(
        self, known: dict[int, Link], sub: SubAddress, *, source: bool = False
    ) -> Link:
        link = known.get(sub.code)
        if link is None:
            of = self._settings
            return Link(self._loop, sub, of.identity, of.page_count, self._user, source=source)
        link.sub = sub
        return link
