"""Who asks, and what they may do."""

from __future__ import annotations

from dataclasses import dataclass

from ropewalk.errors import PermissionDenied

# download: the content of files; users: act for any user of the workspace; admin: workspaces, keys and limits.
RIGHTS = frozenset({"read", "write", "download", "users", "admin"})


@dataclass(frozen=True)
class Caller:
    """One key, in one workspace, for one user or for all of them."""

    organization_id: str
    workspace_id: str
    key_id: str | None  # None: the command line on the machine itself
    user_id: str | None = None  # None: every user's files
    rights: frozenset[str] = RIGHTS

    def needs(self, right: str) -> None:
        """Raises PermissionDenied for a key without this right."""
        if right not in self.rights:
            raise PermissionDenied(
                f"this key may not do this: it needs the right '{right}' and has {', '.join(sorted(self.rights)) or 'none'}"
            )
