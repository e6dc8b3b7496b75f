"""
As whom workers run, and who besides the holder's user may command it: names of the user database as numbers.

It decides which names can be used; it changes nobody's rights.
"""

from __future__ import annotations

import grp
import os
import pwd

import attrs

from copyover.errors import ConfigError, PermissionRefused


@attrs.frozen
class User:
    """A user that workers run as, with its groups."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str

    @property
    def environment(self) -> dict[str, str]:
        return {"USER": self.name, "LOGNAME": self.name, "HOME": self.home}


def find(user: str | None, group: str | None) -> User | None:
    """
    Return the user that workers run as: *group* instead of its own first group, and the groups that list it.

    Raises:
        ConfigError: there is no such user or group, or a group alone is given.
        PermissionRefused: we are not root, and only root can become somebody else.

    """
    if user is None:
        if group is not None:
            raise ConfigError("says nothing without a user: give --user too", key="group")
        return None
    if os.geteuid() != 0:
        raise PermissionRefused(
            f"workers cannot run as {user}: only root may start processes of another user; start the holder as root, "
            f"or as {user} without --user"
        )
    try:
        found = pwd.getpwnam(user)
    except KeyError as unknown:
        raise ConfigError(f"there is no user {user!r}; see: getent passwd", key="user") from unknown
    gid = found.pw_gid if group is None else group_id(group, key="group")
    return User(user, found.pw_uid, gid, tuple(os.getgrouplist(user, gid)), found.pw_dir)


def group_id(name: str, *, key: str) -> int:
    """
    Return the number of the group that the configuration names with *key*.

    Raises:
        ConfigError: there is none.

    """
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as unknown:
        raise ConfigError(f"there is no group {name!r}; see: getent group", key=key) from unknown
