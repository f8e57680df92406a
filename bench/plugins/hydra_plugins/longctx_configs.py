"""Hydra plug-ins: the config sources of configs/ and of the user's folders. Every file is checked when Hydra
loads it.

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
    """Makes `CheckedSource` read the files of configs/, and `OwnSource` those of the user's folders."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Change the reader of configs/ in the search path, and add the user's folders to its end."""
        from bench import CONFIGS
        from bench.config.folders import folders

        for element in search_path.get_path():
            if element.provider == "main" and element.path.removeprefix("file://") == str(CONFIGS):
                element.path = f"{CheckedSource.scheme()}://{CONFIGS}"
        for folder in folders()[1:]:
            search_path.append("user", f"{OwnSource.scheme()}://{folder}")


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


class OwnSource(CheckedSource):
    """A folder of the user: only files, and only in folders of the project's groups. Files of any other
    folder, such as one of Hydra's own groups, are not read, because they could name code."""

    @staticmethod
    def scheme() -> str:
        """The scheme of this source in the search path."""
        return "longctx-bench-own"

    def load_config(self, config_path: str) -> ConfigResult:
        """Load a file, as configs/ does. Raises ConfigLoadError if there is none."""
        if not self.is_config(config_path):
            raise ConfigLoadError(f"Config not found : {Path(self.path, config_path)}")
        return super().load_config(config_path)

    def is_group(self, config_path: str) -> bool:
        """Return whether this is a group of the project with a folder here."""
        from bench.config.folders import group_names

        return config_path in group_names() and Path(self.path, config_path).is_dir()

    def is_config(self, config_path: str) -> bool:
        """Return whether this is a file in such a folder."""
        name = config_path.removesuffix(".yaml")
        return self.is_group(name.rpartition("/")[0]) and Path(self.path, f"{name}.yaml").is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return the names of files or groups, sorted."""
        from bench.config.folders import group_names

        if not config_path:
            groups = [name for name in group_names() if self.is_group(name)]
            return sorted(groups) if results_filter in (None, ObjectType.GROUP) else []
        if not self.is_group(config_path) or results_filter == ObjectType.GROUP:
            return []
        return sorted(path.stem for path in Path(self.path, config_path).glob("*.yaml"))
