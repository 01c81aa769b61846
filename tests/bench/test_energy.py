"""Energy from files as Linux has them; no machine of the tests has counters of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeft.bench.energy import Meter, Refused


def put(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


def test_the_processors_counters_are_added_up_and_may_begin_again(tmp_path: Path) -> None:
    times = iter((10.0, 12.0, 14.0))
    meter = Meter(tmp_path, lambda: next(times))
    first, second, part, board = (tmp_path / "powercap" / f"intel-rapl:{name}" for name in ("0", "1", "0:0", "2"))
    for own, other in ((1_000_000, 9_500_000), (31_000_000, 9_900_000), (61_000_000, 400_000)):
        put(first, name="package-0", energy_uj=own, max_energy_range_uj=10**12)
        put(second, energy_uj=other, max_energy_range_uj=10_000_000)
        put(board, name="psys", energy_uj=2 * own, max_energy_range_uj=10**12)  # holds the processors, too
        put(part, energy_uj=own, max_energy_range_uj=10**12)  # of the first, which holds it already
        meter.look()
    assert meter.watts() == pytest.approx((60 + 0.9) / 4)


def test_a_battery_counts_while_it_is_all_that_feeds_the_machine(tmp_path: Path) -> None:
    battery = tmp_path / "power_supply" / "BAT0"
    put(tmp_path / "power_supply" / "AC", type="Mains")
    put(battery, type="Battery", status="Discharging", current_now=-2_000_000, voltage_now=12_000_000)
    meter = Meter(tmp_path)
    for microwatts in (9_000_000, 11_000_000, 30_000_000):
        put(battery, power_now=microwatts)
        meter.look()
    assert meter.watts() == 11.0
    (battery / "power_now").unlink()
    other = Meter(tmp_path)
    other.look()
    assert other.watts() == pytest.approx(24.0)
    put(battery, status="Charging")
    charging = Meter(tmp_path)
    charging.look()
    with pytest.raises(Refused, match="no energy counter"):
        charging.watts()


def test_what_cannot_be_read_is_no_figure_but_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Meter(tmp_path)
    nothing.look()
    with pytest.raises(Refused, match="no energy counter"):
        nothing.watts()
    put(tmp_path / "powercap" / "intel-rapl:0", energy_uj=5)
    still = Meter(tmp_path)
    still.look()
    still.look()
    with pytest.raises(Refused, match="too short"):
        still.watts()

    plain = Path.read_text

    def deny(path: Path, *given: str) -> str:
        if path.name == "energy_uj":
            raise PermissionError
        return plain(path, *given)

    monkeypatch.setattr(Path, "read_text", deny)  # the tests may run as root, whom no file mode keeps out
    locked = Meter(tmp_path)
    locked.look()
    with pytest.raises(Refused, match="by root alone"):
        locked.watts()
    put(tmp_path / "power_supply" / "BAT0", type="Battery", status="Discharging", power_now=7_000_000)
    locked.look()
    assert locked.watts() == 7.0, "the battery may be read by anybody"
