"""Hydra plug-ins: the config source of configs/. Every file is checked when Hydra loads it.

Hydra finds plug-ins only in the namespace package `hydra_plugins`, and imports them at every start. Therefore
these classes are here, and their functions import other modules only when they run.
"""

from __future__ import annotations

from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf


class CheckedConfigs(SearchPathPlugin):
    """Makes `CheckedSource` read the files of configs/, and only those."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Change the reader of configs/ in the search path, but not the order of the path."""
        from bench import CONFIGS

        for element in search_path.get_path():
            if element.provider == "main" and element.path.removeprefix("file://") == str(CONFIGS):
                element.path = f"{CheckedSource.scheme()}://{CONFIGS}"


class CheckedSource(FileConfigSource):
    """A folder of config files that contain only plain values of knobs, and the entries of groups that are
    derived from declarations (`bench.config.groups`)."""

    @staticmethod
    def scheme() -> str:
        """The scheme of this source in the search path."""
        return "longctx-bench"

    def load_config(self, config_path: str) -> ConfigResult:
        """Load a file or a declared entry. Raises ConfigError for a file with content that is not allowed or
        outside of the folder, and ConfigLoadError if there is neither."""
        from bench.cli import presets
        from bench.config import groups

        name = config_path.removesuffix(".yaml")
        group, _, entry = name.rpartition("/")
        path = self._file(name)
        text = presets.read(name, path) if path else ""
        if path is None and entry not in groups.entries(group):
            raise ConfigLoadError(f"Config not found : {Path(self.path, name)}.yaml")
        header = self._get_header_dict(text)
        content = presets.load(name, header["package"], text)
        presets.check(name, header["package"], content)
        if header["package"] is None:
            content = groups.completed(group, entry, content)
        return ConfigResult(
            config=OmegaConf.create(content), path=self.full_path(), provider=self.provider, header=header
        )

    def is_group(self, config_path: str) -> bool:
        """Return whether there is a folder or a declared group with this name."""
        from bench.config.groups import GROUPS

        return config_path in GROUPS or super().is_group(config_path)

    def is_config(self, config_path: str) -> bool:
        """Return whether there is a file or a declared entry with this name."""
        from bench.config import groups

        group, _, entry = config_path.removesuffix(".yaml").rpartition("/")
        return entry in groups.entries(group) or super().is_config(config_path)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return the names of files, folders and declared entries in a folder, sorted."""
        from bench.config import groups

        is_folder = super().is_group(config_path)
        names = {*super().list(config_path, results_filter)} if is_folder else set()
        if results_filter in (None, ObjectType.CONFIG):
            names |= {*groups.entries(config_path)}
        if results_filter in (None, ObjectType.GROUP) and not config_path:
            names |= {*groups.GROUPS}
        return sorted(names)

    def _file(self, name: str) -> Path | None:
        """Return the file of a config, or None. Raises ConfigError for a path outside of the folder."""
        from bench.config.groups import file_beside
        from bench.inputs.errors import ConfigError

        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ConfigError(f"{name}: not allowed; a config must be the name of a file under {self.path}")
        path = Path(self.path, f"{name}.yaml")
        group, _, entry = name.rpartition("/")
        return path if path.is_file() else file_beside(group, entry)
