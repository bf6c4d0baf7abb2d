"""cmr bench: which devices there are, and which of them are measured."""

import json

from tests.models import RECIPES, write_model

from cmr.bench.devices import cuda_devices, measured_devices
from cmr.cli.main import main


class Driver:
    """A CUDA driver with so many devices."""

    def __init__(self, names, problem=0):
        self.names, self.problem = names, problem

    def cuInit(self, flags):
        return self.problem

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.names)
        return 0

    def cuDeviceGet(self, device, place):
        device._obj.value = place
        return 0

    def cuDeviceGetName(self, name, size, device):
        name.value = self.names[device.value].encode()
        return 0


def test_cuda_devices_are_those_that_the_driver_names():
    def load(name):
        if name != "libcuda.so":
            raise OSError(name)
        return Driver(["NVIDIA A", "NVIDIA B"])

    assert cuda_devices(load) == ["NVIDIA A", "NVIDIA B"]
    assert cuda_devices(lambda name: Driver(["NVIDIA A"], problem=100)) == []
    assert cuda_devices(lambda name: (_ for _ in ()).throw(OSError(name))) == []


def test_all_that_is_here_is_measured(monkeypatch):
    from cmr.bench import devices

    assert measured_devices("portable") == ["portable"]
    monkeypatch.setattr(devices, "_has", lambda package: package == "numba")
    monkeypatch.setattr(devices, "cuda_devices", lambda: ["NVIDIA A"])
    assert measured_devices() == ["cpu"]
    monkeypatch.setattr(devices, "_has", lambda package: True)
    assert measured_devices() == ["cpu", "cuda"]
    monkeypatch.setattr(devices, "cuda_devices", lambda: [])
    assert measured_devices() == ["cpu"]
    monkeypatch.setattr(devices, "_has", lambda package: False)
    assert measured_devices() == ["portable"]


def test_a_device_that_needs_more_is_named(tmp_path, capsys, monkeypatch):
    from cmr.cli import bench

    monkeypatch.setattr(bench, "cuda_devices", lambda: ["NVIDIA A"])
    monkeypatch.setattr(bench, "measured_devices", lambda asked: ["portable"])
    path = str(write_model(tmp_path / "tiny.gguf", RECIPES["llama"]))
    flags = ["-p", "0", "-n", "2", "-r", "1", "-t", "1", "-o", "json", "--noise", "1000"]
    assert main(["bench", path, *flags]) == 0
    out, err = capsys.readouterr()
    assert "NVIDIA A is left out, as numba-cuda is missing: pip install 'cmr-runner[cuda]'" in err
    (row,) = json.loads(out)
    assert (row["devices"], row["backends"]) == ("portable", "PORTABLE")
