"""The profile sees what a process may really use, in trees as real machines have them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from fedra_edge.accelerators import list_accelerators
from fedra_edge.cgroups import GroupLimit, GroupLimits, read_group_limits
from fedra_edge.memory_meter import resident_bytes
from fedra_edge.profiling import (
    NO_CAPS,
    MemoryState,
    SiteCaps,
    measure_device,
    measure_usable_memory,
    unbacked_bytes,
    usable_cpus,
    usable_disk,
    usable_memory,
)

GIB = 2**30
V2_MOUNT = "29 22 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
ROOMY = MemoryState(
    total_bytes=64 * GIB, available_bytes=60 * GIB, resident_bytes=GIB, virtual_bytes=4 * GIB
)


def plant(root: Path, files: Mapping[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def test_a_machine_without_control_groups_has_no_limits(tmp_path: Path) -> None:
    assert read_group_limits(tmp_path) == GroupLimits()


def test_version_2_takes_the_limits_of_all_parents(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/system.slice/fedra.service"
    plant(
        tmp_path,
        {
            "proc/self/cgroup": "0::/system.slice/fedra.service\n",
            "proc/self/mountinfo": V2_MOUNT,
            f"{group}/memory.max": "max\n",
            f"{group}/memory.high": "1073741824\n",
            f"{group}/memory.current": "300000000\n",
            f"{group}/memory.stat": "anon 100\ninactive_file 100000000\nactive_file 50000000\n",
            f"{group}/cpu.max": "max 100000\n",
            "sys/fs/cgroup/system.slice/memory.max": "4294967296\n",
            "sys/fs/cgroup/system.slice/memory.current": "2000000000\n",
            "sys/fs/cgroup/system.slice/cpu.max": "150000 100000\n",
        },
    )
    limits = read_group_limits(tmp_path)
    assert limits.memory == (
        GroupLimit(1073741824, 150_000_000),
        GroupLimit(4294967296, 2_000_000_000),
    )
    assert limits.cpu_count == 1.5


def test_version_2_in_a_container_with_its_own_namespace(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/memory.max": "536870912\n",
            "sys/fs/cgroup/memory.current": "1000\n",
            "sys/fs/cgroup/cpu.max": "50000 100000\n",
        },
    )
    limits = read_group_limits(tmp_path)
    assert limits == GroupLimits((GroupLimit(536870912, 1000),), 0.5)


def test_version_1_in_a_container_that_sees_only_its_own_group(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/self/cgroup": (
                "11:cpu,cpuacct:/docker/abc\n9:memory:/docker/abc\n1:name=systemd:/\n"
            ),
            "proc/self/mountinfo": (
                "40 30 0:35 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
                "41 30 0:36 /docker/abc /sys/fs/cgroup/cpu,cpuacct ro - cgroup c rw,cpu,cpuacct\n"
            ),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "700\n",
            "sys/fs/cgroup/memory/memory.stat": (
                "hierarchical_memory_limit 2147483648\ntotal_inactive_file 200\n"
            ),
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    )
    assert read_group_limits(tmp_path) == GroupLimits((GroupLimit(2 * GIB, 500),), 2.0)


def test_version_1_nested_takes_parents_and_knows_what_no_limit_looks_like(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory"
    plant(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/plant/client\n3:cpu:/\n0::/\n",
            "proc/self/mountinfo": "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup c rw,memory\n",
            f"{base}/plant/client/memory.limit_in_bytes": "9223372036854771712\n",
            f"{base}/plant/memory.limit_in_bytes": "1073741824\n",
            f"{base}/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert read_group_limits(tmp_path) == GroupLimits((GroupLimit(GIB, 0),), None)


def test_a_group_path_outside_the_mount_falls_back_to_the_mount(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../elsewhere\n",
            "proc/self/mountinfo": V2_MOUNT.replace("/sys/fs/cgroup", "/sys/fs/my\\040groups"),
            "sys/fs/my groups/memory.max": "1000000\n",
        },
    )
    assert read_group_limits(tmp_path).memory == (GroupLimit(1_000_000, 0),)


@pytest.mark.parametrize("text", ["", "nonsense", "0::", "::::\n\n", "4:memory\n"])
def test_nonsense_in_proc_is_no_limit(tmp_path: Path, text: str) -> None:
    plant(tmp_path, {"proc/self/cgroup": text, "proc/self/mountinfo": text})
    assert read_group_limits(tmp_path) == GroupLimits()


def test_memory_is_the_tightest_of_all_limits() -> None:
    assert usable_memory(ROOMY, GroupLimits(), SiteCaps()) == 61 * GIB - int(64 * GIB * 0.05)
    assert usable_memory(ROOMY, GroupLimits((GroupLimit(2 * GIB, GIB),)), SiteCaps()) == 2 * GIB
    assert usable_memory(ROOMY, GroupLimits(), SiteCaps(memory_bytes=GIB)) == GIB


def test_what_others_use_of_a_group_is_not_ours() -> None:
    limits = GroupLimits((GroupLimit(limit_bytes=4 * GIB, used_bytes=3 * GIB),))
    assert usable_memory(ROOMY, limits, SiteCaps()) == 2 * GIB


def test_our_share_of_mapped_files_does_not_hide_what_others_use() -> None:
    state = replace(ROOMY, file_bytes=GIB // 2)  # which a group does not count as used
    limits = GroupLimits((GroupLimit(limit_bytes=4 * GIB, used_bytes=3 * GIB),))
    assert usable_memory(state, limits, SiteCaps()) == GIB + GIB // 2
    assert usable_memory(state, GroupLimits(), SiteCaps()) == (
        usable_memory(ROOMY, GroupLimits(), SiteCaps()) - GIB // 2  # nor what is available twice
    )


def test_an_address_space_limit_leaves_out_what_is_only_reserved() -> None:
    state = MemoryState(64 * GIB, 60 * GIB, GIB, 4 * GIB, address_limit_bytes=8 * GIB)
    assert usable_memory(state, GroupLimits(), SiteCaps()) == 5 * GIB


@pytest.mark.skipif(sys.platform != "linux", reason="address limits are those of Linux")
def test_weights_that_were_mapped_but_not_read_do_not_count_against_an_address_limit(
    tmp_path: Path,
) -> None:
    import resource

    file = tmp_path / "weights"
    with file.open("wb") as opened:
        opened.truncate(GIB)
    idle_bytes = unbacked_bytes()
    limit, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (idle_bytes + 3 * GIB, hard))
    try:
        mapped = np.memmap(file, np.uint8, mode="c")
        assert abs(measure_usable_memory(NO_CAPS, idle_bytes, root=tmp_path) - 3 * GIB) < GIB // 10
        assert abs(measure_usable_memory(NO_CAPS, root=tmp_path) - 2 * GIB) < GIB // 10
        del mapped
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def test_processors_are_limited_by_affinity_quota_and_site() -> None:
    assert usable_cpus(8, GroupLimits(), SiteCaps()) == 8
    assert usable_cpus(8, GroupLimits(cpu_count=1.5), SiteCaps()) == 1.5
    assert usable_cpus(8, GroupLimits(cpu_count=4.0), SiteCaps(threads=2)) == 2


def test_disk_is_asked_of_a_home_that_does_not_exist_yet(tmp_path: Path) -> None:
    home = tmp_path / "not" / "yet"
    assert usable_disk(home, SiteCaps()) > 0
    assert usable_disk(home, SiteCaps(disk_bytes=1000)) == 1000


def test_this_machine_is_measured(tmp_path: Path) -> None:
    caps = SiteCaps(memory_bytes=512_000_000, max_layers=3)
    profile = measure_device(backend="torch", home=tmp_path, caps=caps)
    assert profile.memory_bytes <= 512_000_000
    assert profile.baseline_bytes == pytest.approx(resident_bytes(), rel=0.2)
    assert profile.max_layers == 3
    assert profile.cpu_count > 0


class DriverError(Exception):
    """What the driver's library raises."""


@dataclass(frozen=True)
class CardMemory:
    """Memory of a recorded card."""

    total: int
    free: int


class RecordedDriver:
    """Two cards, as nvidia-ml-py described them on a real machine."""

    NVMLError = DriverError
    uuids = ("GPU-aaaa-1", "GPU-bbbb-2")

    def __init__(self, *, has_driver: bool = True) -> None:
        self.has_driver = has_driver
        self.is_open = False

    def nvmlInit(self) -> None:  # noqa: N802
        """Open the driver."""
        if not self.has_driver:
            raise DriverError("Driver Not Loaded")
        self.is_open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        """Close the driver."""
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        """Count the cards."""
        return len(self.uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> object:  # noqa: N802
        """Name a card."""
        return index

    def nvmlDeviceGetName(self, handle: object, /) -> bytes:  # noqa: N802
        """Give a card's name, in bytes as old versions do."""
        return f"NVIDIA card {handle}".encode()

    def nvmlDeviceGetUUID(self, handle: object, /) -> str:  # noqa: N802
        """Give a card's unique name."""
        assert isinstance(handle, int)
        return self.uuids[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: object, /) -> CardMemory:  # noqa: N802
        """Give a card's memory."""
        assert isinstance(handle, int)
        return CardMemory(total=(handle + 1) * GIB, free=GIB)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["NVIDIA card 0", "NVIDIA card 1"]),
        ("1", ["NVIDIA card 1"]),
        ("1,0", ["NVIDIA card 1", "NVIDIA card 0"]),
        ("GPU-bbbb", ["NVIDIA card 1"]),
        ("0,7,1", ["NVIDIA card 0"]),
        ("", []),
        ("-1", []),
    ],
)
def test_only_the_visible_cards_are_told(visible: str | None, names: list[str]) -> None:
    driver = RecordedDriver()
    assert [card.name for card in list_accelerators(driver, visible)] == names
    assert not driver.is_open


def test_without_a_driver_there_is_no_accelerator() -> None:
    assert list_accelerators(RecordedDriver(has_driver=False), None) == ()
