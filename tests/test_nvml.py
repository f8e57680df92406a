"""What becomes of a driver's answers, without a device: the real binding loads a library compiled here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from ctypes import CDLL
from pathlib import Path
from typing import Any

import pytest
from conftest import HANG_SECONDS

from bench.records import KEYS

ROOT = Path(__file__).parents[1]
UUID = "GPU-of-this-machine"
FULL = {
    "clock": "1980",
    "memory_clock": "2619",
    "temperature": "41",
    "power": "412500",
    "limit": "700000",
    "reasons": str(4 | 32 | 1),
    "energy": "7000",
    "used": str(3 << 30),
    "processes": f"self:{2 << 30},4242:1024",
}
KEYS_OF = {
    "clock": ["gpu_clock_mhz"],
    "memory_clock": ["gpu_memory_clock_mhz"],
    "temperature": ["gpu_temperature_celsius"],
    "power": ["gpu_power_watts"],
    "limit": ["gpu_power_limit_watts"],
    "reasons": ["gpu_throttling"],
    "energy": ["energy_joules_per_token"],
    "used": ["nvml_device_bytes"],
    "processes": ["gpu_foreign_processes", "nvml_process_bytes"],
}
"""What is asked of the driver → the record's keys that it tells."""
NOT_AVAILABLE = 2**64 - 1
"""NVML_VALUE_NOT_AVAILABLE; of 32 bits, where the function's answer is."""

READ = """
import json, os, sys
from dataclasses import asdict
from bench.measure import nvml

for state in json.loads(sys.argv[1]):
    for name in [name for name in os.environ if name.startswith("NVML_")]:
        del os.environ[name]
    for name, told in state["told"].items():
        os.environ["NVML_" + name] = told.replace("self", str(os.getpid()))
    print(json.dumps(asdict(nvml.state(state["uuid"]))))
assert "torch" not in sys.modules
"""


def compiled(folder: Path, *flags: str) -> Path:
    """The library, under the name that the binding looks for."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    command = ["cc", "-shared", "-fPIC", *flags, "-o", folder / "libnvidia-ml.so.1"]
    subprocess.run([*command, ROOT / "tests/data/nvml.c"], check=True)
    return folder


def python(library: Path | None, *arguments: str) -> list[Any]:
    """What a process that finds this library prints, line by line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if library:
        environment["LD_LIBRARY_PATH"] = str(library)
    done = subprocess.run(
        [sys.executable, "-c", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("driver"))


def states(library: Path | None, *told: dict[str, str], uuid: str = UUID) -> list[dict[str, Any]]:
    """The device's state after each set of answers."""
    return python(library, READ, json.dumps([{"told": one, "uuid": uuid} for one in told]))


def test_answers_get_their_units_and_words(driver: Path) -> None:
    (found,) = states(driver, FULL)
    assert found == {
        "gpu_clock_mhz": 1980,
        "gpu_memory_clock_mhz": 2619,
        "gpu_temperature_celsius": 41,
        "gpu_power_watts": 412.5,
        "gpu_power_limit_watts": 700.0,
        "gpu_throttling": "power cap, heat",
        "gpu_foreign_processes": 1,
        "nvml_process_bytes": 2 << 30,
        "nvml_device_bytes": 3 << 30,
        "gpu_reason": None,
        "joules": 7.0,
    }
    assert {*found} - {"joules"} < {*KEYS}


def test_an_error_of_one_call_takes_its_keys_alone_and_is_named(driver: Path) -> None:
    errors = {3: "Not Supported", 4: "Insufficient Permissions", 15: "GPU is lost", 4321: "library's own"}
    asked = [(name, code) for name in FULL for code in errors]
    answers = states(driver, FULL, *({**FULL, name: f"!{code}"} for name, code in asked))
    full, *rest = answers
    for (name, code), found in zip(asked, rest, strict=True):
        lost = {key for key in full if found[key] is None} - {"gpu_reason"}
        assert lost == {"joules" if key.startswith("energy") else key for key in KEYS_OF[name]}
        assert [part.split(": ")[0] for part in found["gpu_reason"].split("; ")] == KEYS_OF[name]
        assert found["gpu_reason"].count(errors[code]) == len(KEYS_OF[name])
        assert {key: full[key] for key in full if key not in lost | {"gpu_reason"}} == {
            key: found[key] for key in full if key not in lost | {"gpu_reason"}
        }


def test_what_is_not_available_is_no_number(driver: Path) -> None:
    nothing = {name: str(NOT_AVAILABLE) for name in FULL if name != "processes"}
    (found,) = states(driver, {**nothing, "processes": f"self:{NOT_AVAILABLE},7:{NOT_AVAILABLE}"})
    assert found.pop("gpu_foreign_processes") == 1
    reasons = dict(part.split(": ") for part in found.pop("gpu_reason").split("; "))
    assert {*found.values()} == {None}
    assert {*reasons.values()} == {"not available"}
    assert {*reasons} == {key for keys in KEYS_OF.values() for key in keys} - {"gpu_foreign_processes"}


def test_a_container_s_process_is_one_of_those_under_the_host_s_numbers(driver: Path) -> None:
    """Which one cannot be told, nor what memory it has; that it is there is known."""
    alone, shared, unlisted = states(
        driver,
        {**FULL, "processes": "900001:77"},
        {**FULL, "processes": "900001:77,900002:78,900003:79"},
        {**FULL, "processes": ""},
    )
    assert (alone["gpu_foreign_processes"], shared["gpu_foreign_processes"]) == (0, 2)
    assert alone["nvml_process_bytes"] is shared["nvml_process_bytes"] is None
    assert "in a container" in alone["gpu_reason"]
    assert unlisted["gpu_foreign_processes"] is unlisted["nvml_process_bytes"] is None
    assert unlisted["gpu_reason"].count("no process is listed") == 2


def test_a_driver_that_is_not_there_says_why_and_nothing_else(driver: Path) -> None:
    (unloaded,) = states(driver, {**FULL, "init": "!9"})
    (other,) = states(driver, FULL, uuid="GPU-of-another")
    for found, why in ((unloaded, "Driver Not Loaded"), (other, "Not Found")):
        assert found.pop("gpu_reason") == why
        assert {*found.values()} == {None}


def test_no_library_is_said_so() -> None:
    try:
        CDLL("libnvidia-ml.so.1")
    except OSError:
        (found,) = states(None, FULL)
        assert found.pop("gpu_reason") == "NVML Shared Library Not Found"
        assert {*found.values()} == {None}
    else:
        pytest.skip("this machine has a driver")


def test_an_older_driver_lacks_functions(tmp_path: Path) -> None:
    (found,) = states(compiled(tmp_path, "-DOLD"), FULL)
    assert found["gpu_throttling"] is found["joules"] is None
    assert found["gpu_clock_mhz"] == 1980
    assert found["gpu_reason"].count("Function Not Found") == 2


HARNESS = """
import json, os, sys, threading, time
import torch
from bench.run import memory_limit
from bench.run.devices import CPU, Device
from bench.config.spec import CellSpec, DataSpec, MeasureSpec, ModelSizes
from bench.measure import nvml, contention

def say(**told):
    os.environ.update({"NVML_" + name: str(value) for name, value in told.items()})

GIB = 2**30
device = torch.device("cuda")
nvml.uuid = lambda name: "GPU-of-this-machine"  # torch names a device that it has
card = Device("cuda", "GPU-of-this-machine")
say(used=GIB, energy=7000, reasons=0)

def spec(limit=None):
    return CellSpec(
        variant="dense", variant_params={}, seq_len=8, depth=1, batch_size=1, replicate=0, objective="clm",
        device="cuda", dtype="float32", activations="keep", model=ModelSizes(), data=DataSpec(),
        measure=MeasureSpec(limit_bytes=limit),
    )

sizes = {"free": memory_limit.memory_bytes(spec(), card), "asked": memory_limit.memory_bytes(spec(5), card)}
print(json.dumps(sizes))
window = contention.ContentionMonitor(device)
say(energy=9500)
joules = window.joules()
say(reasons=32)
print(json.dumps({"joules": joules, **window.end()}))

first = memory_limit.await_release(card)
say(used=3 * GIB)
threading.Timer(0.3, say, kwargs={"used": GIB + 4096}).start()
returned = memory_limit.leftover_bytes("GPU-of-this-machine", 3600)
say(used=3 * GIB)
kept = memory_limit.leftover_bytes("GPU-of-this-machine", 0.2)
say(used=GIB // 2)
lower = memory_limit.await_release(card)
say(used="!3")
print(json.dumps({"first": first, "returned": returned, "kept": kept, "lower": lower,
    "untold": memory_limit.await_release(card), "cpu": memory_limit.await_release(CPU),
    "free": memory_limit.memory_bytes(spec(), card)}))
"""


def test_the_harness_asks_the_driver(driver: Path) -> None:
    """For the memory that a cell may take and that has come back, and for energy over a window."""
    memory, window, settled = python(driver, HARNESS)
    assert memory == {"free": 79 << 30, "asked": 5}
    assert window["joules"] == 2.5
    assert window["gpu_throttling"] == "heat"
    assert "throttled" in window["contaminated"]
    assert "gpu_clock_mhz: Not Supported" in window["gpu_reason"]
    assert (settled["first"], settled["returned"]) == (0, 0)
    assert settled["kept"] == 2 << 30
    assert settled["lower"] == 0, "others have left"
    assert settled["untold"] is settled["cpu"] is None
    assert settled["free"] == sys.maxsize
