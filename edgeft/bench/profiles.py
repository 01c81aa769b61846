"""Device profiles: what is known of a phone, board or laptop before one owns it, every figure with its source."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgeft.errors import EdgeftError

PROFILES = "profiles.yaml"
GIGABYTE = 10**9
# What one app gets. Phones: the largest models that loaded, and the smallest that did not, in PocketPal AI's runs on
# 8 GB phones (3.5 GiB of 8 GB); the others leave room for the system.
USABLE_SHARE = {"phone": 0.45, "board": 0.75, "laptop": 0.75}


class _Typed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(_Typed):
    """One number: from a data sheet or review (spec), worked out from one (derived), taken on the device (measured), or
    written down without a look at its source (unverified)."""

    value: float = Field(gt=0)
    kind: Literal["spec", "derived", "measured", "unverified"]
    source: str = Field(min_length=3, description="Name in the file's `sources`, or an address.")


class Cluster(_Typed):
    """Cores of one kind. `fast` cores are those worth a thread: in-order and efficiency cores are not."""

    count: int = Field(gt=0)
    core: str
    ghz: float = Field(gt=0)
    fast: bool = True


class Cpu(_Typed):
    """All clusters, and the instructions of the *fast* cores that matrix products depend on."""

    clusters: tuple[Cluster, ...] = Field(min_length=1)
    isa: Literal["armv8.0", "dotprod", "i8mm", "avx2"]
    kind: Literal["spec", "measured", "unverified"]
    source: str

    @model_validator(mode="after")
    def _one_fast(self) -> Cpu:
        if not any(cluster.fast for cluster in self.clusters):
            raise ValueError("at least one cluster must be fast")
        return self


class Profile(_Typed):
    """A device. `achievable_gbps`: what its memory was measured to give; without it a share of the peak is taken."""

    title: str
    family: Literal["phone", "board", "laptop"]
    soc: str
    cpu: Cpu
    ram_gb: Figure
    bandwidth_gbps: Figure
    achievable_gbps: Figure | None = None
    usable_share: float | None = Field(default=None, gt=0, le=1, description="Of the RAM, for one app.")

    @property
    def usable_bytes(self) -> int:
        """Memory that one app can count on."""
        return int(self.ram_gb.value * GIGABYTE * (self.usable_share or USABLE_SHARE[self.family]))

    @property
    def threads(self) -> int:
        """As many fast cores as keep the pace highest (see `pace`)."""
        fast = sum(cluster.count for cluster in self.cpu.clusters if cluster.fast)
        return max(range(1, fast + 1), key=lambda n: (self.pace(n), -n))

    def pace(self, threads: int) -> float:
        """Cycles per second of `threads` cores that wait for the slowest of them after every matrix, fastest first."""
        ghz = sorted((c.ghz for c in self.cpu.clusters for _ in range(c.count)), reverse=True)
        return threads * ghz[min(threads, len(ghz)) - 1] * 1e9


def load_profiles(path: Path | None = None) -> dict[str, Profile]:
    """edgeft's own profiles by name, and those of the file `path` beside or instead of them.

    Raises EdgeftError with every problem of that file.
    """
    own = _parse(resources.files("edgeft.bench").joinpath(PROFILES).read_text("utf-8"), PROFILES)
    if path is None:
        return own
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise EdgeftError(f"{path}: {error.strerror}", "name a YAML file of device profiles") from None
    return {**own, **_parse(text, str(path))}


def find_profile(name: str, profiles: dict[str, Profile]) -> Profile:
    """The profile called `name`. Raises EdgeftError with the nearest names."""
    if name not in profiles:
        close = difflib.get_close_matches(name, profiles, n=3, cutoff=0.5)
        raise EdgeftError(
            f"no device is called {name!r}" + (f"; did you mean {', '.join(close)}?" if close else ""),
            "`edgeft devices` lists them; --profiles FILE adds your own",
        )
    return profiles[name]


def _parse(text: str, where: str) -> dict[str, Profile]:
    hint = "edgeft/bench/profiles.yaml is the example to copy"
    try:
        raw: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise EdgeftError(f"{where}: not valid YAML: {error}", hint) from None
    if not isinstance(raw, dict) or not isinstance(raw.get("devices"), dict):
        raise EdgeftError(f"{where}: expected a mapping with `devices` (and `sources`)", hint)
    sources = raw.get("sources") or {}
    profiles, problems = {}, []
    for name, entry in raw["devices"].items():
        try:
            profile = Profile.model_validate(entry)
        except ValidationError as error:
            problems += [f"  {name}.{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors()]
            continue
        cited = [profile.cpu.source, profile.ram_gb.source, profile.bandwidth_gbps.source]
        cited += [profile.achievable_gbps.source] if profile.achievable_gbps else []
        unknown = [s for s in cited if s not in sources and "://" not in s]
        problems += [f"  {name}: source {s!r} is neither an address nor one of `sources`" for s in unknown]
        profiles[str(name)] = _with_addresses(profile, sources)
    if problems:
        raise EdgeftError(f"{where}: {len(problems)} problem(s)\n" + "\n".join(problems), hint)
    return profiles


def _with_addresses(profile: Profile, sources: dict[str, str]) -> Profile:
    """The profile with the names of sources replaced by what they stand for."""
    changes: dict[str, Any] = {}
    for field in ("cpu", "ram_gb", "bandwidth_gbps", "achievable_gbps"):
        figure = getattr(profile, field)
        if figure:
            changes[field] = figure.model_copy(update={"source": sources.get(figure.source, figure.source)})
    return profile.model_copy(update=changes)
