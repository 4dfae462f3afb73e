"""DMC Remastered: the looks, where they come from, and that only looks change."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from localmotion.envs import list_envs, list_options, make_env
from localmotion.envs.base import PixelEnv
from localmotion.envs.textures import COUNTS, SIDES, ProceduralTextures, find_textures
from localmotion.errors import ConfigError

Make = Callable[..., PixelEnv]


@pytest.fixture
def make() -> Iterator[Make]:
    opened: list[PixelEnv] = []

    def build(name: str, **settings: Any) -> PixelEnv:
        opened.append(make_env(name, **{"quality": "fast", **settings}))
        return opened[-1]

    yield build
    for env in opened:
        env.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four skies and four floors of random blobs, at the sides they are drawn with."""
    root = tmp_path_factory.mktemp("textures")
    rng = np.random.default_rng(0)
    for kind, side in SIDES.items():
        (root / kind).mkdir()
        (root / kind / "notes.txt").write_text("not a picture")
        for name in ("b.png", "a.png", "C.png", "d.png"):
            small = rng.integers(0, 256, (9, 9, 3), np.uint8)
            cv2.imwrite(str(root / kind / name), cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC))
    return root


def actions(env: PixelEnv, count: int) -> np.ndarray:
    shape = env.action_space.shape
    assert shape is not None
    return np.random.default_rng(0).uniform(-1, 1, (count, *shape)).astype(np.float32)


def test_every_task_of_the_suite_is_there() -> None:
    assert [name.partition(":")[2] for name in list_envs("dmcr")] == [name.partition(":")[2] for name in list_envs("dmc")]


def test_passes_the_checker_of_gymnasium(make: Make) -> None:
    check_env(make("dmcr:cheetah_run", percept_size=128), skip_render_check=True)


@pytest.mark.parametrize("task", ["walker_run", "hopper_stand", "cheetah_run", "reacher_easy", "swimmer_swimmer6"])
def test_physics_and_rewards_are_those_of_the_plain_task(make: Make, task: str) -> None:
    plain, dressed = make(f"dmc:{task}"), make(f"dmcr:{task}")
    for seed in (3, 4):
        first, second = plain.reset(seed=seed)[0]["image"], dressed.reset(seed=seed)[0]["image"]
        assert np.abs(first.astype(int) - second).mean() > 5  # the look is another
        np.testing.assert_array_equal(plain.state(), dressed.state())
        for action in actions(plain, 5):
            assert plain.step(action)[1] == dressed.step(action)[1]
        np.testing.assert_array_equal(plain.state(), dressed.state())


def test_without_factors_the_picture_is_the_plain_one(make: Make) -> None:
    plain, dressed = make("dmc:walker_run"), make("dmcr:walker_run", factors="none")
    np.testing.assert_array_equal(plain.reset(seed=1)[0]["image"], dressed.reset(seed=1)[0]["image"])


def test_swapped_textures_look_as_if_the_model_was_built_with_them(make: Make, pictures: Path) -> None:
    """The same look, compiled from XML with the files as textures and every number written into it."""
    import mujoco
    from dm_control.suite import common, walker

    from localmotion.envs.dmcr import draw_look
    from localmotion.envs.render import SceneRenderer

    env: Any = make("dmcr:walker_run", textures=pictures, visual_seed=11)
    seen = env.reset(seed=5)[0]["image"]
    look = draw_look(11, 4, 4)

    def text(values: Any) -> str:
        return " ".join(repr(float(value)) for value in values)

    xml, assets = walker.get_model_and_assets()
    assets = {name: data if isinstance(data, bytes) else data.encode() for name, data in assets.items()}
    sky, floor = (sorted((pictures / kind).glob("*.png"))[n] for kind, n in (("skies", look.sky), ("floors", look.floor)))
    assets["./common/skybox.xml"] = (
        f'<mujoco><asset><texture name="skybox" type="skybox" file="{sky}"/></asset></mujoco>'.encode()
    )
    materials = assets["./common/materials.xml"].decode()
    begin, end = materials.index("<texture"), materials.index("/>") + 2
    materials = materials[:begin] + f'<texture name="grid" type="2d" file="{floor}"/>' + materials[end:]
    materials = materials.replace('reflectance=".2"', f'reflectance="{look.reflectance!r}"')
    for name, before, colour in (("self", ".7 .5 .3 1", look.body), ("effector", ".7 .4 .2 1", look.effector)):
        materials = materials.replace(f'name="{name}" rgba="{before}"', f'name="{name}" rgba="{text(colour)}"')
    assets["./common/materials.xml"] = materials.encode()
    visual = assets["./common/visual.xml"].decode()
    for name, before, colour in (
        ("ambient", ".4 .4 .4", look.ambient),
        ("diffuse", ".8 .8 .8", look.diffuse),
        ("specular", "0.1 0.1 0.1", look.specular),
    ):
        visual = visual.replace(f'{name}="{before}"', f'{name}="{text(colour)}"')
    assets["./common/visual.xml"] = visual.encode()
    model_text = xml.decode() if isinstance(xml, bytes) else xml
    place = env.physics.model.ptr.cam_pos[0]
    assert not np.allclose(place, (0, -2, 0.7))
    model_text = model_text.replace('name="side" pos="0 -2 .7"', f'name="side" pos="{text(place)}"')
    assert common is not None
    built = mujoco.MjModel.from_xml_string(model_text, assets)
    data = mujoco.MjData(built)
    data.qpos[:] = env.physics.data.qpos
    mujoco.mj_forward(built, data)
    renderer = SceneRenderer(built, size=64, camera=0, quality="fast")
    np.testing.assert_allclose(built.cam_poscom0[0], env.physics.model.ptr.cam_poscom0[0], atol=1e-12)
    picture = renderer.frame(data)
    renderer.close()
    np.testing.assert_array_equal(picture, seen)


def test_a_moved_camera_and_lamp_are_where_a_compiler_puts_them(make: Make) -> None:
    import mujoco

    env: Any = make("dmcr:cheetah_run", factors="camera,light")
    env.reset(seed=2)
    model = env.physics.model.ptr
    moved = {name: getattr(model, name).copy() for name in ("cam_pos0", "cam_poscom0", "cam_mat0", "light_pos0", "light_poscom0")}
    mujoco.mj_setConst(model, mujoco.MjData(model))
    for name, value in moved.items():
        np.testing.assert_allclose(getattr(model, name), value, atol=1e-12, err_msg=name)
    assert 1 <= model.light_pos[0, 2] <= 5
    assert -3.2 <= model.cam_pos[0, 1] <= -2.8


@pytest.mark.parametrize("factor", ["background", "floor", "body", "target", "reflectance", "camera", "light"])
def test_each_factor_alone_changes_the_picture_and_nothing_else_does(make: Make, pictures: Path, factor: str) -> None:
    task = "reacher_easy" if factor == "target" else "cheetah_run"
    plain = make(f"dmc:{task}").reset(seed=1)[0]["image"].astype(int)
    env: Any = make(f"dmcr:{task}", factors=[factor], textures=pictures)
    images = [env.reset(seed=1, options={"visual_seed": seed})[0]["image"].astype(int) for seed in (1, 2, 1)]
    np.testing.assert_array_equal(images[0], images[2])
    assert (images[0] != images[1]).any()
    assert (images[0] != plain).any()
    assert env.describe()["factors"] == [factor]


def test_hopper_stand_keeps_its_camera_unless_told(make: Make) -> None:
    assert "camera" not in make("dmcr:hopper_stand").describe()["factors"]
    assert "camera" in make("dmcr:hopper_stand", factors="all").describe()["factors"]
    assert "camera" in make("dmcr:hopper_hop").describe()["factors"]


def test_the_look_follows_from_the_reset_seed_or_the_option(make: Make) -> None:
    env: Any = make("dmcr:walker_run")
    _, first = env.reset(seed=1)
    _, again = env.reset(seed=1)
    _, other = env.reset(seed=2)
    assert first["visual_seed"] == again["visual_seed"] != other["visual_seed"]
    fixed: Any = make("dmcr:walker_run", visual_seed=77)
    assert {fixed.reset(seed=seed)[1]["visual_seed"] for seed in (1, 2)} == {77}
    _, asked = env.reset(seed=1, options={"visual_seed": 5})
    assert asked["visual_seed"] == 5
    assert env.reset(seed=1)[1]["visual_seed"] == first["visual_seed"]  # a wish holds for one episode


def test_drawn_numbers_stay_what_they_are() -> None:
    from localmotion.envs.dmcr import draw_look

    look = draw_look(1, 119, 383)
    assert (look.sky, look.floor, look.shadow_size) == (60, 364, 1825)
    expected = [0.07207980635981687, 0.31183145201048545, 0.42332644897257565, 0.8277025938204418, 0.9871623617843109]
    np.testing.assert_allclose([look.reflectance, *look.body], expected, atol=1e-12)
    np.testing.assert_allclose(look.ambient, [0.38085269236117253, 0.40775982128116894, 0.387794046704071], atol=1e-12)
    many = [draw_look(seed, 119, 383) for seed in range(1, 400)]
    assert {0, 118} <= {m.sky for m in many}
    assert max(m.sky for m in many) == 118
    assert all(0.75 <= m.body[3] <= 1 and 0 <= m.reflectance <= 0.5 and 1548 <= m.shadow_size <= 2548 for m in many)
    assert all(m.ambient.min() >= 0.05 and m.ambient.max() <= 0.85 for m in many)


def test_environments_of_one_process_keep_their_own_textures(make: Make, pictures: Path) -> None:
    kinds: list[dict[str, Any]] = [{"textures": pictures}, {"textures": "procedural"}, {"factors": "floor,light"}]

    def run(env: PixelEnv) -> Iterator[np.ndarray]:
        for seed in (1, 2):
            yield env.reset(seed=seed)[0]["image"]
            for action in actions(env, 2):
                yield env.step(action)[0]["image"]

    alone = [list(run(make("dmcr:walker_run", **kind))) for kind in kinds]
    together = zip(*(run(make("dmcr:walker_run", **kind)) for kind in kinds), strict=True)
    for step, images in enumerate(together):
        for kind, image in enumerate(images):
            np.testing.assert_array_equal(image, alone[kind][step])


def digest(name: str, options: dict[str, Any]) -> str:
    """Hash of pictures, states and rewards of a short episode; also run in a fresh process."""
    env = make_env(name, quality="fast", **options)
    found = hashlib.sha256(env.reset(seed=4)[0]["image"].tobytes())
    for action in actions(env, 4):
        observation, reward, *_ = env.step(action)
        found.update(observation["image"].tobytes() + repr(reward).encode() + env.state().tobytes())
    env.close()
    return found.hexdigest()


def test_a_fresh_process_sees_the_same() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_envs_dmcr import digest; print(digest('dmcr:hopper_stand', {}))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True)
    assert done.stdout.strip() == digest("dmcr:hopper_stand", {}), done.stderr


def test_folders_are_read_in_order_of_names_and_described(make: Make, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = find_textures(pictures)
    assert [folder.name("skies", index) for index in range(4)] == ["C.png", "a.png", "b.png", "d.png"]
    monkeypatch.setenv("LOCALMOTION_DMCR_TEXTURES", str(pictures))
    facts = make("dmcr:walker_run").describe()["textures"]
    assert facts == folder.describe()
    assert facts["source"] == "folder"
    assert facts["floors"] == 4
    monkeypatch.delenv("LOCALMOTION_DMCR_TEXTURES")
    facts = make("dmcr:walker_run").describe()["textures"]
    assert facts["source"] == "procedural"
    assert facts["skies"] == COUNTS["skies"]


def test_procedural_pictures_have_the_statistics_of_the_originals() -> None:
    """Mean over pictures of brightness and contrast; the originals have 131 and 21 (floors), 117 and 50 (skies)."""
    source = ProceduralTextures()
    for kind, mean, contrast in (("floors", 131, 21), ("skies", 117, 50)):
        greys = [cv2.cvtColor(source.picture(kind, index), cv2.COLOR_RGB2GRAY) for index in range(30)]  # type: ignore[arg-type]
        assert abs(np.mean([grey.mean() for grey in greys]) - mean) < 12
        assert abs(np.mean([grey.std() for grey in greys]) - contrast) < 6
        assert len({grey.tobytes() for grey in greys}) == 30


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"factors": "flor"}, "did you mean floor"),
        ({"visual_seed": 0}, "visual_seed=0"),
        ({"visual_seed": 1.5}, "whole number"),
        ({"textures": "/nowhere"}, "floors/ and skies/"),
        ({"texture": "x"}, "did you mean textures"),
    ],
)
def test_wrong_options_say_what_is_right(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_env("dmcr:walker_run", **options)


def test_options_go_only_to_suites_that_have_them() -> None:
    assert list_options("dmcr") == ["visual_seed", "factors", "textures"]
    with pytest.raises(ConfigError, match="dmc has no options"):
        make_env("dmc:walker_run", visual_seed=1)
    with pytest.raises(ConfigError, match="dmcr:walker_run"):
        make_env("dmcr:walker_rnu")
    with pytest.raises(ConfigError, match="floors is not a folder"):
        make_env("dmcr:walker_run", textures=Path(__file__).parent)
