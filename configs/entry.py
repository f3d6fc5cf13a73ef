"""Where hydra stops: a yaml file and the command line become one frozen dataclass.

`launch(Config, main, "train")` at the bottom of a script composes configs/train.yaml with the
overrides, checks everything before any folder exists, then calls main(config). A user's mistake
prints one line and exits with status 2. Hydra's own flags keep working: --help, --cfg job, and -m
key=a,b runs one job a value, each in its own numbered folder below `out`.
"""

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import AnyNode, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from selfflow.datasets.spec import UserError

Config = TypeVar("Config")
Check = Callable[[Config], Any] | None
FOLDER = Path(__file__).resolve().parent


def launch(
    config_type: type[Config],
    main: Callable[[Config], Any],
    config_name: str,
    check: Callable[[Config], Any] | None = None,
) -> None:
    """Runs main(config); `check(config)` may raise UserError before anything is written."""
    flags = {argument for argument in sys.argv[1:] if argument.startswith("-")}
    overrides = [argument for argument in sys.argv[1:] if argument not in flags]
    try:
        if flags & {"-h", "--help"}:
            print(_help(config_name))
        elif not flags:
            main(_checked(config_type, config_name, overrides, check))
        else:
            if flags <= {"-m", "--multirun"}:
                for job in _jobs(overrides):
                    _checked(config_type, config_name, job, check)
            _run_hydra(config_type, main, config_name, check)
    except UserError as e:
        fail(str(e))
    except KeyboardInterrupt:
        fail("interrupted", status=130)


def compose(config_type: type[Config], config_name: str, overrides: list[str]) -> Config:
    """What `launch` hands to main for these overrides. Raises UserError."""
    with hydra.initialize_config_dir(str(FOLDER), version_base=None):
        try:
            cfg = hydra.compose(config_name, overrides)
        except HydraException as e:
            raise UserError(_explain(e, config_name)) from e
    return typed(config_type, cfg)


def typed(config_type: type[Config], cfg: DictConfig) -> Config:
    """The composed config as its frozen dataclass. Raises UserError on an unknown key or bad value,
    and turns a ValueError of the dataclass's __post_init__ into one."""
    try:
        merged = OmegaConf.merge(_schema(config_type, cfg), cfg)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except (ConfigKeyError, ConfigAttributeError) as e:
        known: Any = e.object_type if dataclasses.is_dataclass(e.object_type) else config_type
        names = [field.name for field in dataclasses.fields(known)]
        raise UserError(f"{e.full_key}: no such key; {_choices(str(e.key), names)}") from e
    except MissingMandatoryValue as e:
        raise UserError(f"{_one_line(e).rpartition(' ')[2]}=... is required") from e
    except OmegaConfBaseException as e:
        text = _one_line(e)
        if "is not a ListConfig" in text:
            text = f"give a list: '{e.full_key}=[...]'"
        raise UserError(f"{e.full_key}: {text}") from e
    except ValueError as e:
        raise UserError(str(e)) from e


def one_of(key: str, value: str, choices: Iterable[str]) -> str:
    """The value, or UserError naming the choices."""
    names = list(choices)
    if value not in names:
        raise UserError(f"{key}={value}: no such {key}; {_choices(value, names)}")
    return value


def fail(message: str, status: int = 2) -> NoReturn:
    """One line on standard error, then exit."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(status)


def _checked(
    config_type: type[Config], config_name: str, overrides: list[str], check: "Check[Config]"
) -> Config:
    config = compose(config_type, config_name, overrides)
    if check:
        check(config)
    return config


def _run_hydra(
    config_type: type[Config],
    main: Callable[[Config], Any],
    config_name: str,
    check: "Check[Config]",
) -> None:
    def run(cfg: DictConfig) -> None:
        # One job of a sweep: `out` is the numbered folder that hydra has made for it.
        if "out" in cfg:
            cfg.out = os.path.relpath(HydraConfig.get().runtime.output_dir)
        config = typed(config_type, cfg)
        try:
            if check:
                check(config)
            main(config)
        except UserError as e:  # which hydra would print with a traceback
            fail(str(e))

    hydra.main(version_base=None, config_path=str(FOLDER), config_name=config_name)(run)()


def _jobs(overrides: list[str]) -> list[list[str]]:
    """The overrides of each job of a sweep."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as e:
        raise UserError(_explain(e, "")) from e
    return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]


def _schema(config_type: Any, cfg: DictConfig) -> DictConfig:
    """The dataclass as omegaconf's schema, writable down to its nested frozen dataclasses, which
    omegaconf otherwise locks before the yaml's values are in."""
    schema = OmegaConf.structured(config_type)
    OmegaConf.set_readonly(schema, False)
    for name, hint in get_type_hints(config_type).items():
        given, kinds = cfg._get_node(name, validate_access=False), (hint, *get_args(hint))
        nested: Any = next((t for t in kinds if dataclasses.is_dataclass(t)), None)
        if nested and isinstance(given, AnyNode) and not (given._is_none() or given._is_missing()):
            keys = ", ".join(f"{name}.{field.name}" for field in dataclasses.fields(nested))
            raise UserError(f"{name}={given}: give its own keys, {keys}")
        if not nested or not isinstance(given, DictConfig) or given._is_none():
            continue
        if get_origin(hint) is dict:
            for key in given:
                schema[name][key] = _schema(nested, given[key])
        else:
            schema[name] = _schema(nested, given)
    return schema


def _help(config_name: str) -> str:
    doc = sys.modules["__main__"].__doc__ or ""
    text = (FOLDER / f"{config_name}.yaml").read_text(encoding="utf-8")
    return (
        f"{doc.strip()}\n\nKeys, defaults and meanings (configs/{config_name}.yaml):\n\n"
        f"{text}\nFlags: --cfg job prints the composed config; -m key=a,b runs one job a value."
    )


def _explain(error: HydraException, config_name: str) -> str:
    text = _one_line(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not of the form key=value; quote special characters: 'key=\"…\"'"
    if text.startswith("Could not override"):
        key = text.split("'")[1]
        cfg: Any = hydra.compose(config_name)
        for mapping in accumulate(key.split("."), "{}.{}".format):
            if OmegaConf.select(cfg, mapping) == {}:  # by default: what it may hold is not known
                return f"{key}: give its values one by one, +{mapping}.NAME=VALUE"
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if not isinstance(node, DictConfig):  # no such parent either
            node, name = cfg, key.partition(".")[0]
        return f"{key}: no such key; {_choices(name, map(str, node))}"
    if found := re.search(r"Could not find '(.+)/(.*?)' .*?Available options in '.+?': (.*)", text):
        group, name, options = found.groups()
        known = options.partition(" Config search path")[0].split()
        return f"{group}={name}: no such {group}; {_choices(name, known)}"
    return text


def _choices(name: str, have: Iterable[str]) -> str:
    """The choices, the close match first."""
    names = sorted(have)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}choose one of {', '.join(names)}"


def _one_line(error: BaseException) -> str:
    noise = ("full_key", "object_type", "reference_type", "To append")
    lines = (line.strip() for line in str(error).splitlines())
    return " ".join(line for line in lines if line and not line.startswith(noise))
