"""Generated planar bodies: trees of 2 to 7 links, each with a task of locomotion (``run``) and one of reaching (``reach``).

Every number of a body comes from a SHA-256 of the text `STREAM`, the body's number and the name of the quantity, so it does not depend on
a library's random generator. Bodies 0000 to 0015 are for training and 0016 to 0019 for development. Bodies 0020 to 0027 are sealed:
they are kept for a test that is registered before it is run. `tree_hash` fixes them.

A link is a capsule that is hinged to its parent, with a motor, and touches only the floor. In ``run`` the root
moves freely in the plane, as dm_control's walker and cheetah do. In ``reach`` the root's beginning is hinged to the world, with a motor and
without gravity, as in dm_control's reacher, and the end of the longest chain has to be in a disc.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from localmotion.envs.planar_drawing import View
from localmotion.errors import ConfigError

STREAM = "localmotion planar trees, first edition"
TRAIN, DEV, SEALED = range(0, 16), range(16, 20), range(20, 28)
KINDS = ("run", "reach")
TASKS = tuple(f"tree-{number:04d}_{kind}" for number in (*TRAIN, *DEV) for kind in KINDS)
"""The bodies for training and development. Sealed ones have names of the same form."""
SEALED_TASKS = tuple(f"tree-{number:04d}_{kind}" for number in SEALED for kind in KINDS)

SIZES = (2, 3, 4, 5, 6, 7)
ROOT_PLACES = (0.0, 1.0, 0.5)
"""Where the root's children begin, as shares of its length; the order of the first two is drawn."""
GRAVITY = 9.81
LIFT, SPIN, SPRING = 2.0, 30.0, 0.8
"""Motors in ``run``. Torque: factor on the weight on a hinge times the length of its link. Largest speed of a hinge that is not loaded:
torque over damping, rad/s. Spring towards the rest position: stiffness in torques per radian; dm_control's cheetah has springs, too."""
DEEPEST = 3
"""Links of a chain below the root."""
POSITIONS, MARGIN = 200, 1.06
"""Positions of the hinges from which a body's extent is found, and the window's half side in extents."""
REACH_GAIN, REACH_SPIN = 60.0, 5.0
"""Angular acceleration (rad/s²) of a stretched arm at full torque, and its largest speed (rad/s), in ``reach``."""
FROUDE = 0.6
"""The reward of ``run`` is 1 from the speed sqrt(g D) times this on; D is twice the body's largest extent."""
TARGET = 0.12
"""Radius of the target in ``reach``, as a share of the body's extent."""


@dataclass(frozen=True)
class Link:
    """One link. Its frame begins at its hinge and has its x axis along it.

    parent    number of the parent, -1 for the root
    start     where it begins on its parent, as a share of the parent's length
    length    metres, between the centres of the capsule's round ends
    radius    metres
    rest      angle to its parent where the hinge is at zero, degrees, counterclockwise
    low, high range of the hinge, degrees
    strength  factor on the torque of its motor
    """

    parent: int
    start: float
    length: float
    radius: float
    rest: float
    low: float
    high: float
    strength: float

    @property
    def mass(self) -> float:
        """Kilograms, at the density of water."""
        return 1000 * np.pi * self.radius**2 * (self.length + 4 / 3 * self.radius)


@dataclass(frozen=True)
class Tree:
    """A body; parents come before their children."""

    number: int
    links: tuple[Link, ...]

    def below(self, link: int) -> list[int]:
        """The link and everything that hangs on it."""
        inside = [link]
        for k in range(link + 1, len(self.links)):
            if self.links[k].parent in inside:
                inside.append(k)
        return inside

    def way(self, link: int, start: int = 0) -> float:
        """Metres along the tree from the beginning of link ``start`` to the end of ``link``, which is below it."""
        total, share = 0.0, 1.0
        while True:
            total += share * self.links[link].length
            if link == start:
                return total
            share, link = self.links[link].start, self.links[link].parent

    @property
    def tip(self) -> int:
        """The link whose end has to reach the target: the one that reaches farthest."""
        return max(range(len(self.links)), key=self.way)

    @property
    def mass(self) -> float:
        """Kilograms."""
        return sum(link.mass for link in self.links)

    def extent(self, kind: str) -> float:
        """Metres from the middle of the picture (the centre of mass in ``run``, the root's hinge in ``reach``) to the body's farthest
        point, in the widest of many positions of the hinges."""
        masses = np.array([link.mass for link in self.links])
        widest = 0.0
        for trial in range(POSITIONS):
            turns: list[float] = []
            ends: list[tuple[complex, complex]] = []
            for k, link in enumerate(self.links):
                share = _share(f"body {self.number}", f"position {trial} {k}")
                turn, begin = 0.0, 0j
                if k:
                    first, last = ends[link.parent]
                    turn = turns[link.parent] + link.rest + link.low + (link.high - link.low) * share
                    begin = first + link.start * (last - first)
                turns.append(turn)
                ends.append((begin, begin + link.length * complex(np.exp(1j * np.deg2rad(turn)))))
            middle = complex(np.mean(ends, axis=1) @ masses / masses.sum()) if kind == "run" else 0j
            far = [abs(end - middle) + link.radius for both, link in zip(ends, self.links, strict=True) for end in both]
            widest = max(widest, *far)
        return widest

    @property
    def speed(self) -> float:
        """Speed from which on the reward of ``run`` is 1, m/s."""
        return round(FROUDE * float(np.sqrt(GRAVITY * 2 * self.extent("run"))), 2)

    def view(self, kind: str) -> View:
        """The window of its pictures for "run" or "reach"."""
        half = round(MARGIN * self.extent(kind), 2)
        if kind == "reach":
            return View(above=True, half=half, tile=round(half / 4, 3))
        return View(half=half, middle=round(0.75 * half, 3), follows=True, tile=round(half / 4, 3))


def parse(task: str) -> tuple[int, str] | None:
    """Number and kind of a tree's task, e.g. (17, "run"); None for any other name."""
    if task not in TASKS and task not in SEALED_TASKS:
        return None
    name, _, kind = task.partition("_")
    return int(name.removeprefix("tree-")), kind


def check_seal(task: str, sealed: object) -> None:
    """Raise ConfigError for a sealed body without the option ``sealed=True``, or for that option with another name."""
    if task in SEALED_TASKS and sealed is not True:
        raise ConfigError(
            f"planar:{task}: bodies {SEALED[0]:04d} to {SEALED[-1]:04d} are kept for the pre-registered test; use tree-0000 to"
            f" tree-{DEV[-1]:04d}, or, for that test only, the option sealed=True"
        )
    if task not in SEALED_TASKS and sealed is not False:
        raise ConfigError(f"option sealed={sealed!r:.60} of planar:{task}: it is not one of the sealed bodies; leave it out")


def tree(number: int) -> Tree:
    """The body with this number, 0..27."""
    # The sizes take turns in each group, in an order that is drawn: six bodies in a row have all of them.
    group = next(group for group in (TRAIN, DEV, SEALED) if number in group)
    sizes = sorted(SIZES, key=lambda size: _share(f"group {group[0]}", f"size {size}"))
    links: list[Link] = []
    for k in range(sizes[(number - group[0]) % len(sizes)]):
        links.append(_link(f"body {number}", k, links))
    return Tree(number, tuple(links))


def tree_hash() -> str:
    """SHA-256 of the MJCF of the sealed bodies, in hexadecimal digits. It builds and draws nothing."""
    digest = hashlib.sha256()
    for number in SEALED:
        for kind in KINDS:
            digest.update(mjcf(tree(number), kind).encode())
    return digest.hexdigest()


def _share(body: str, what: str) -> float:
    """A number in [0, 1) that is fixed for each quantity of each body."""
    digest = hashlib.sha256(f"{STREAM}: {body}, {what}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _link(body: str, k: int, before: list[Link]) -> Link:
    def drawn(what: str, low: float, high: float, digits: int = 3) -> float:
        return round(low + (high - low) * _share(body, f"{what} {k}"), digits)

    parent, start, rest = -1, 0.0, 0.0
    if k:
        parent = _parent(body, k, before)
        siblings = [link for link in before if link.parent == parent]
        if parent == 0:
            start = ROOT_PLACES[len(siblings)]
            if start != 0.5 and _share(body, "first end") >= 0.5:
                start = 1.0 - start
            tail = len(siblings) > 0 and _share(body, f"tail {k}") < 0.3
            rest = drawn("rest", 40, 140, 1) if tail else drawn("rest", -130, -50, 1)  # the root lies, so this is up or down
        else:
            # Legs zigzag around their direction at the root, and two links at one end part.
            start = 1.0
            bent = before[parent].rest if parent and before[parent].parent else 0.0
            side = -np.sign(siblings[0].rest) if siblings else -np.sign(bent)
            side = side or (1.0 if _share(body, f"side {k}") < 0.5 else -1.0)
            rest = side * drawn("rest", 25, 75, 1)
    length = drawn("length", 0.4, 0.65) if k == 0 else drawn("length", 0.25, 0.5)
    return Link(
        parent=parent,
        start=start,
        length=length,
        radius=drawn("radius", 0.03, 0.055),
        rest=float(rest),
        low=drawn("low", -85, -45, 1),
        high=drawn("high", 45, 85, 1),
        strength=drawn("strength", 0.7, 1.3),
    )


def _parent(body: str, k: int, before: list[Link]) -> int:
    """Mostly the last link, so that limbs grow, or the root, so that there are several; else any other with room."""
    children = [sum(link.parent == j for link in before) for j in range(len(before))]
    depths = [0]
    for link in before[1:]:
        depths.append(depths[link.parent] + 1)
    room = [j for j in range(k) if children[j] < (len(ROOT_PLACES) if j == 0 else 2) and depths[j] < DEEPEST]
    wish = _share(body, f"parent {k}")
    if wish < 0.55 and k - 1 in room:
        return k - 1
    if wish < 0.9 and 0 in room:
        return 0
    return room[int(_share(body, f"other parent {k}") * len(room))]


def mjcf(body: Tree, kind: str) -> str:
    """The MuJoCo model of a body for ``run`` or ``reach``, as XML."""
    free = kind == "run"
    axis = "0 -1 0" if free else "0 0 1"  # counterclockwise to the viewer
    gears = _gears(body, free)
    lines, motors, target = [], [], ""

    def add(k: int, indent: str) -> None:
        link = body.links[k]
        at = f"{_text(link.start * body.links[link.parent].length)} 0 0" if k else "0 0 1" if free else "0 0 0.1"
        lines.append(f'{indent}<body name="link{k}" pos="{at}" axisangle="{axis} {_text(link.rest)}">')
        if k == 0 and free:
            lines.append(f'{indent}  <camera name="side" pos="0 -3 0" quat="0.707 0.707 0 0" mode="trackcom"/>')
            for name, slide in (("rootx", "1 0 0"), ("rootz", "0 0 1")):
                lines.append(f'{indent}  <joint name="{name}" class="root" type="slide" axis="{slide}"/>')
            middle = _text(link.length / 2)
            lines.append(f'{indent}  <joint name="rooty" class="root" axis="{axis}" pos="{middle} 0 0"/>')
        else:
            spin = SPIN if free else REACH_SPIN
            limits = f'range="{_text(link.low)} {_text(link.high)}"' if k else 'limited="false"'
            passive = f'damping="{_text(gears[k] / spin)}"' + (f' stiffness="{_text(SPRING * gears[k])}"' if free else "")
            lines.append(f'{indent}  <joint name="joint{k}" axis="{axis}" {limits} {passive}/>')
            motors.append(f'    <motor name="joint{k}" joint="joint{k}" gear="{_text(gears[k])}"/>')
        lines.append(f'{indent}  <geom name="link{k}" fromto="0 0 0 {_text(link.length)} 0 0" size="{_text(link.radius)}"/>')
        if k == body.tip and not free:
            lines.append(f'{indent}  <site name="tip" pos="{_text(link.length)} 0 0" size="{_text(0.9 * link.radius)}"/>')
        for child in range(k + 1, len(body.links)):
            if body.links[child].parent == k:
                add(child, indent + "  ")
        lines.append(f"{indent}</body>")

    add(0, "    ")
    if not free:
        size = _text(TARGET * body.extent(kind))
        target = f'\n    <geom name="target" type="sphere" pos="0 0 0.1" size="{size}"/>\n    <camera name="fixed"/>'
    bodies, actuators = "\n".join(lines), "\n".join(motors)
    return f"""<mujoco model="tree-{body.number:04d}_{kind}">
  <compiler angle="degree"/>
  <option timestep="0.005">{"" if free else '<flag gravity="disable" contact="disable"/>'}</option>
  <custom>
    <numeric name="speed" data="{_text(body.speed)}"/>
    <numeric name="window" data="{_text(body.view(kind).half)}"/>
  </custom>
  <default>
    <joint type="hinge" limited="true" armature="0.01" solimplimit="0 .99 .01"/>
    <geom type="capsule" contype="1" conaffinity="0" friction=".8 .1 .1" density="1000"/>
    <motor ctrllimited="true" ctrlrange="-1 1"/>
    <default class="root">
      <joint limited="false" armature="0" damping="0"/>
    </default>
  </default>
  <worldbody>
    <geom name="floor" type="plane" conaffinity="1" size="250 250 .2"/>
{bodies}{target}
  </worldbody>
  <sensor>
    <subtreelinvel name="velocity" body="link0"/>
  </sensor>
  <actuator>
{actuators}
  </actuator>
</mujoco>
"""


def _gears(body: Tree, free: bool) -> list[float]:
    """Torques of the motors, N m. On the ground they scale with the weight that a hinge carries on both of its sides; for reaching, with
    the inertia of what it turns. So light and heavy bodies move alike."""
    gears = []
    for k, link in enumerate(body.links):
        hanging = body.below(k)
        if free:
            distal = sum(body.links[j].mass for j in hanging)
            gears.append(link.strength * LIFT * GRAVITY * float(np.sqrt(distal * (body.mass - distal))) * link.length)
        else:
            arms = [body.way(j, k) - body.links[j].length / 2 for j in hanging]
            inertia = sum(body.links[j].mass * arm**2 for j, arm in zip(hanging, arms, strict=True))
            gears.append(link.strength * REACH_GAIN * inertia)
    return gears


def _text(value: float) -> str:
    """A number with at most four decimals."""
    return f"{value:.4f}".rstrip("0").rstrip(".")
