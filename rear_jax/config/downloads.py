"""Settings that name files of a model hub: the one place where these become files on this machine."""

from ml_collections import ConfigDict

from rear_jax.config.ranges import ALLOWED, leaves
from rear_jax.errors import RearError
from rear_jax.weights import hub


def fetched(config: ConfigDict) -> ConfigDict:
    """A copy of checked settings in which each `hf://owner/repo/file` is the path of that file, which is downloaded.

    Raises RearError: as `hub.fetched`; the setting is named.
    """
    copy = config.copy_and_resolve_references()
    for key, (section, name) in leaves(copy):
        if (allowed := ALLOWED.get(key)) and allowed.hub and section[name].startswith(hub.SCHEME):
            try:
                section[name] = str(hub.fetched(section[name]))
            except RearError as error:
                raise RearError(f"config.{key}: {error}") from None
    return copy
