from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import numpy.typing as npt
import pytest

from datasets import aircraft
from datasets.aircraft_airframes import AIRFRAMES
from datasets.aircraft_geometry import KEYPOINTS, MIRROR, Mesh, build
from datasets.aircraft_raster import front_facing, rasterise, unoccluded
from datasets.aircraft_render import Scene, attitude, project, render

Floats = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def batch() -> dict:
    return aircraft.render_split("train", workers=1, limit=150)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [aircraft.sample_scene(0, "train", i) for i in range(150)]


def seen_from(azimuth: float, elevation: float, airframe: str = "twin_narrow_body", distance: float = 150.0) -> Scene:
    """A level aircraft, nose to +x, in noon light over grass, seen by a camera that looks at its origin."""
    base = aircraft.sample_scene(0, "train", 0)
    e, a = math.radians(elevation), math.radians(azimuth)
    out = np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
    right = np.cross(-out, [0, 0, 1])
    right /= np.linalg.norm(right)
    rows = [tuple(float(v) for v in row) for row in (right, np.cross(-out, right), -out)]
    return dataclasses.replace(
        base,
        airframe=airframe,
        stretch=(1.0, 1.0, 1.0),
        gear=False,
        setting="approach",
        yaw=0.0,
        pitch=0.0,
        roll=0.0,
        altitude=30.0,
        rotation=(rows[0], rows[1], rows[2]),
        translation=(0.0, 0.0, distance),
        focal=2.5,
        sun=(0.0, -0.6, 0.8),
        sunlight=(1.0, 1.0, 1.0),
        ambient=(0.25, 0.25, 0.25),
        ground="grass",
        ground_colours=((0.05, 0.10, 0.03), (0.05, 0.10, 0.03)),
        runway=False,
        exposure=0.8,
        black=0.0,
        noise=0.0,
        visibility=1e6,
    )


def point(rendered_points: Floats, name: str) -> Floats:
    return rendered_points[KEYPOINTS.index(name)]


# --- meshes ----------------------------------------------------------------------------------------------------------


def test_there_are_24_distinct_keypoints_and_their_mirror_images() -> None:
    assert len(KEYPOINTS) == len(set(KEYPOINTS)) == 24
    assert [MIRROR[k] for k in MIRROR] == list(range(24))
    assert all(("left" in KEYPOINTS[k]) == ("right" in KEYPOINTS[MIRROR[k]]) for k in range(24))


@pytest.mark.parametrize("name", AIRFRAMES)
def test_airframes_are_symmetric_and_keypoints_sit_on_them(name: str) -> None:
    mesh = build(name)
    flip = np.array([1.0, -1.0, 1.0])
    np.testing.assert_allclose(mesh.keypoints[list(MIRROR)] * flip, mesh.keypoints, atol=1e-12)
    mirrored = {tuple(v) for v in (mesh.vertices * flip + 0.0).round(6).tolist()}
    assert len({tuple(v) for v in mesh.vertices.round(6).tolist()} - mirrored) <= 0.1 * len(mesh.vertices)
    assert point(mesh.keypoints, "wing_tip_left")[1] > 0 > point(mesh.keypoints, "wing_tip_right")[1]
    away = distance_to_mesh(mesh.keypoints, mesh)
    assert away.max() < 0.012 * AIRFRAMES[name].length, dict(zip(KEYPOINTS, away.round(2).tolist(), strict=True))


def distance_to_mesh(points: Floats, mesh: Mesh, n: int = 12) -> Floats:
    """Distance from each point to a dense sample of the surface."""
    i, j = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    inside = i + j <= n
    u, v = i[inside] / n, j[inside] / n
    weights = np.stack([1 - u - v, u, v], axis=-1)
    surface = np.einsum("wk,fkd->fwd", weights, mesh.vertices[mesh.faces]).reshape(-1, 3)
    return np.array([np.linalg.norm(surface - p, axis=1).min() for p in points])


@pytest.mark.parametrize("name", AIRFRAMES)
@pytest.mark.parametrize("gear", [False, True])
def test_normals_are_unit_and_agree_with_the_winding(name: str, gear: bool) -> None:
    mesh = build(name, gear).stretched((0.9, 1.1, 1.05))
    np.testing.assert_allclose(np.linalg.norm(mesh.normals, axis=-1), 1.0, atol=1e-9)
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    flat = np.cross(b - a, c - a)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    assert (np.einsum("fd,fkd->fk", flat, mesh.normals) > 0).mean() > 0.99
    if gear:
        assert mesh.vertices[:, 2].min() == pytest.approx(mesh.ground)


def test_stretching_refuses_what_would_turn_the_mesh_inside_out() -> None:
    with pytest.raises(ValueError, match="three positive numbers"):
        build("trijet").stretched((1.0, -1.0, 1.0))


def test_an_unknown_airframe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean trijet"):
        build("trijets")


# --- rasteriser ------------------------------------------------------------------------------------------------------


def naive_raster(xy: Floats, closeness: Floats, faces: npt.NDArray[np.int32], size: int) -> Floats:
    """Closeness per pixel, one pixel and one triangle at a time, by barycentric coordinates."""
    best = np.full((size, size), -np.inf)
    for face in faces:
        a, b, c = xy[face]
        area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
        if area >= 0:
            continue
        for i in range(size):
            for j in range(size):
                p = np.array([j + 0.5, i + 0.5])
                w1 = ((p[0] - a[0]) * (c[1] - a[1]) - (p[1] - a[1]) * (c[0] - a[0])) / area
                w2 = ((b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0])) / area
                if min(w1, w2, 1 - w1 - w2) > 0:
                    best[i, j] = max(best[i, j], closeness[face] @ [1 - w1 - w2, w1, w2])
    return best


def test_rasteriser_equals_the_naive_one() -> None:
    rng = np.random.default_rng(3)
    size = 20
    xy = rng.uniform(-6, size + 6, (24, 2))  # partly outside the image
    closeness = rng.uniform(0.1, 1, 24)
    faces = np.array([rng.choice(24, 3, replace=False) for _ in range(16)], dtype=np.int32)
    triangles = front_facing(xy, closeness, faces)
    owner, depth = rasterise(triangles, size, size)
    expected = naive_raster(xy, closeness, faces, size)
    assert ((owner >= 0) == np.isfinite(expected).ravel()).all()
    np.testing.assert_allclose(depth.reshape(size, size), expected, atol=1e-9)


def test_triangles_that_share_edges_leave_no_gap_and_no_overlap() -> None:
    n = 7
    rng = np.random.default_rng(0)
    g = np.linspace(0, 16, n)
    xy = np.stack(np.meshgrid(g, g, indexing="xy"), -1)
    xy[1:-1, 1:-1] += rng.uniform(-0.9, 0.9, (n - 2, n - 2, 2))
    xy = xy.reshape(-1, 2)
    cells = np.array([i * n + j for i in range(n - 1) for j in range(n - 1)])[:, None]
    faces = np.concatenate([cells + np.array([0, n, 1]), cells + np.array([1, n, n + 1])]).astype(np.int32)
    everything = front_facing(xy, np.ones(len(xy)), faces)
    assert len(everything.index) == len(faces)
    assert (rasterise(everything, 16, 16)[0] >= 0).all()
    alone = sum((rasterise(front_facing(xy, np.ones(len(xy)), f[None]), 16, 16)[0] >= 0).sum() for f in faces)
    assert alone == 16 * 16


def test_nothing_to_draw_is_an_empty_image() -> None:
    none = front_facing(np.zeros((3, 2)), np.ones(3), np.array([[0, 1, 2]], dtype=np.int32))
    owner, depth = rasterise(none, 4, 5)
    assert owner.tolist() == [-1] * 20
    assert (depth == -np.inf).all()


# --- geometry of the picture -----------------------------------------------------------------------------------------


def test_targets_are_the_saved_points_through_the_saved_camera(batch: dict) -> None:
    extras = batch["extras"]
    points, pose, camera = (extras[k].astype(np.float64) for k in ("keypoints_3d", "pose", "camera"))
    seen = np.einsum("nij,nkj->nki", pose[:, :, :3], points) + pose[:, None, :, 3]
    assert (seen[..., 2] > 0).all()
    u = camera[:, None, 0] * seen[..., 0] / seen[..., 2] + camera[:, None, 2]
    v = camera[:, None, 1] * seen[..., 1] / seen[..., 2] + camera[:, None, 3]
    np.testing.assert_allclose(np.stack([u, v], -1).reshape(len(u), 48), batch["targets"], atol=2e-3)
    rotation = pose[:, :, :3]
    np.testing.assert_allclose(rotation @ rotation.transpose(0, 2, 1), np.tile(np.eye(3), (len(u), 1, 1)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(rotation), 1.0, atol=1e-5)


def test_saved_attitude_and_world_pose_agree(batch: dict) -> None:
    extras = batch["extras"]
    for angles, world in zip(extras["attitude"], extras["world_pose"], strict=True):
        np.testing.assert_allclose(attitude(*angles.tolist()), world[:, :3], atol=1e-5)
    assert np.ptp(extras["attitude"][:, 0]) > 1.8 * math.pi  # full yaw
    assert (extras["world_pose"][:, 2, 3] > 0).all()
    # Every camera stands above the ground.
    eye = -np.einsum("nji,nj->ni", extras["pose"][:, :, :3], extras["pose"][:, :, 3])
    height = np.einsum("nj,nj->n", extras["world_pose"][:, 2, :3], eye) + extras["world_pose"][:, 2, 3]
    assert (height > 1.0).all()


@pytest.mark.parametrize(
    ("angles", "nose", "left"),
    [
        ((0, 0, 0), (1, 0, 0), (0, 1, 0)),
        ((90, 0, 0), (0, 1, 0), (-1, 0, 0)),
        ((0, 90, 0), (0, 0, 1), (0, 1, 0)),
        ((0, 0, 90), (1, 0, 0), (0, 0, 1)),
        ((180, 0, 0), (-1, 0, 0), (0, -1, 0)),
    ],
)
def test_attitude_of_known_poses(angles: tuple[int, int, int], nose: tuple, left: tuple) -> None:
    turn = attitude(*(math.radians(a) for a in angles))
    np.testing.assert_allclose(turn[:, 0], nose, atol=1e-12)
    np.testing.assert_allclose(turn[:, 1], left, atol=1e-12)


def test_projection_by_hand() -> None:
    camera = np.array([100.0, 80.0, 32.0, 30.0])
    uv = project(np.array([[0.0, 0.0, 5.0], [1.0, 0.0, 2.0], [0.0, -1.0, 4.0]]), camera)
    np.testing.assert_allclose(uv, [[32, 30], [82, 30], [32, 10]])


def test_seen_from_the_left_the_nose_is_on_the_left_and_the_fin_is_up() -> None:
    drawn = render(seen_from(90, 0), 64)  # the camera stands at +y, off the left wing
    uv = drawn.keypoints
    assert point(uv, "nose")[0] < point(uv, "tail_tip")[0]
    assert point(uv, "fin_tip_front")[1] < point(uv, "fuselage_top")[1] < point(uv, "fuselage_bottom")[1]
    other = render(seen_from(-90, 0), 64).keypoints
    assert point(other, "nose")[0] > point(other, "tail_tip")[0]


def test_mirrored_camera_gives_mirrored_keypoints_and_silhouette() -> None:
    left, right = render(seen_from(60, 20), 64), render(seen_from(-60, 20), 64)
    mirrored = right.keypoints[list(MIRROR)] * [-1, 1] + [64, 0]
    np.testing.assert_allclose(left.keypoints, mirrored, atol=1e-9)
    assert (left.visible == right.visible[list(MIRROR)]).all()


def test_image_follows_the_keypoints() -> None:
    """The drawn wing tips lie where the targets say: red at the left one, green at the right one."""
    drawn = render(seen_from(180, 75, distance=110.0), 192)
    red, green = (drawn.image[..., c].astype(int) for c in (0, 1))
    for name, mask in (("wing_tip_left", red > 2 * green + 40), ("wing_tip_right", green > 1.5 * red + 40)):
        rows, columns = np.nonzero(mask)
        assert len(rows) > 5, name
        near = np.hypot(columns + 0.5 - point(drawn.keypoints, name)[0], rows + 0.5 - point(drawn.keypoints, name)[1])
        assert near.min() < 4, name


# --- visibility ------------------------------------------------------------------------------------------------------


def test_the_near_side_is_seen_and_the_far_side_is_not() -> None:
    visible = {azimuth: render(seen_from(azimuth, 5), 64).visible for azimuth in (90, -90)}
    for near, azimuth in (("left", 90), ("right", -90)):
        far = "right" if near == "left" else "left"
        for name in ("wing_root_rear", "wing_root_front", "engine_front"):
            assert not visible[azimuth][KEYPOINTS.index(f"{name}_{far}")]
        assert visible[azimuth][KEYPOINTS.index(f"wing_tip_{near}")]
        assert visible[azimuth][KEYPOINTS.index(f"wing_root_front_{near}")]
    above, below = render(seen_from(180, 80), 64).visible, render(seen_from(180, -80), 64).visible
    assert above[KEYPOINTS.index("fuselage_top")]
    assert not above[KEYPOINTS.index("fuselage_bottom")]
    assert below[KEYPOINTS.index("fuselage_bottom")]
    assert not below[KEYPOINTS.index("fuselage_top")]
    front, back = render(seen_from(0, 10), 64).visible, render(seen_from(180, 10), 64).visible
    assert front[KEYPOINTS.index("nose")]
    assert not back[KEYPOINTS.index("nose")]
    assert front[KEYPOINTS.index("engine_front_left")]
    assert not back[KEYPOINTS.index("engine_front_left")]


def test_visibility_equals_ray_casting(batch: dict, scenes: list[Scene]) -> None:
    """Moeller-Trumbore in three dimensions against the screen-space depth test."""
    compared = differ = 0
    for i in range(12):
        mesh = build(scenes[i].airframe, scenes[i].gear).stretched(scenes[i].stretch)
        pose = batch["extras"]["pose"][i].astype(np.float64)
        eye = -pose[:, :3].T @ pose[:, 3]
        length = np.ptp(mesh.vertices[:, 0])
        a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
        facing = np.einsum("fd,fd->f", np.cross(b - a, c - a), eye - a) > 0
        a, b, c = a[facing], b[facing], c[facing]
        for k, p in enumerate(mesh.keypoints):
            ray = p - eye
            forward = pose[2, :3] @ ray
            h = np.cross(ray, c - a)
            det = np.einsum("fd,fd->f", b - a, h)
            u = np.einsum("d,fd->f", eye, h) - np.einsum("fd,fd->f", a, h)
            q = np.cross(eye - a, b - a)
            v, t = q @ ray, np.einsum("fd,fd->f", c - a, q)
            with np.errstate(divide="ignore", invalid="ignore"):
                u, v, t = u / det, v / det, t / det
                hit = (u >= 0) & (v >= 0) & (u + v <= 1) & (t > 0) & (t < 1 - 0.012 * length / forward)
            compared += 1
            differ += int(bool(hit.any()) == bool(batch["extras"]["visibility"][i, k]))
    assert compared == 12 * 24
    assert differ <= 2  # float32 poses: a ray along an edge may fall on either side


def test_occlusion_by_a_single_triangle() -> None:
    xy = np.array([[0.0, 0.0], [0.0, 10.0], [10.0, 0.0]])
    triangle = front_facing(xy, np.full(3, 0.5), np.array([[0, 1, 2]], dtype=np.int32))
    at = np.array([[2.0, 2.0], [2.0, 2.0], [8.0, 8.0]])
    assert unoccluded(triangle, at, np.array([0.4, 0.6, 0.4])).tolist() == [False, True, True]


# --- light -----------------------------------------------------------------------------------------------------------


def test_the_aircraft_casts_a_shadow_on_the_ground() -> None:
    """Off the sun's side the ground is darker where a sun ray through the aircraft meets it than elsewhere."""
    scene = dataclasses.replace(seen_from(180, 70, distance=200.0), sun=(0.0, -0.6, 0.8), altitude=30.0)
    drawn = render(scene, 96)
    # The shadow of the middle of the fuselage: 30 m down along the sun's direction.
    pose, camera = drawn.camera_from_body, drawn.camera
    spot = -np.array(scene.sun) * (scene.altitude / scene.sun[2])
    clear = spot + np.array([0.0, 55.0, 0.0])
    inside = project(pose[:, :3] @ spot + pose[:, 3], camera)
    outside = project(pose[:, :3] @ clear + pose[:, 3], camera)
    dark, bright = (drawn.image[int(v), int(u)].astype(float).mean() for u, v in (inside, outside))
    assert 0.3 * bright < dark < 0.75 * bright


def test_the_sunny_side_is_brighter() -> None:
    base = dataclasses.replace(seen_from(90, 5), exposure=0.5)
    to, away = (render(dataclasses.replace(base, sun=(0.0, y, 0.6)), 64).image for y in (0.8, -0.8))
    hull = (slice(30, 34), slice(26, 38))
    assert to[hull].mean() > 1.4 * away[hull].mean()


def test_exposure_brightens_and_clips() -> None:
    scene = seen_from(120, 30)
    low, mid, high = (render(dataclasses.replace(scene, exposure=e), 64).image for e in (0.2, 0.8, 4.0))
    assert low.mean() < mid.mean() < high.mean()
    assert (high == 255).any(-1).mean() > 0.03
    crushed = render(dataclasses.replace(scene, black=0.1), 64).image
    assert (crushed == 0).mean() > 0.3


# --- the data set ----------------------------------------------------------------------------------------------------


def test_shapes_types_and_meta(batch: dict) -> None:
    n = 150
    assert batch["images"].shape == (n, 64, 64, 3)
    assert batch["images"].dtype == np.uint8
    assert batch["targets"].shape == (n, 48)
    assert batch["targets"].dtype == np.float32
    assert {k: v.shape for k, v in batch["extras"].items()} == {
        "visibility": (n, 24),
        "keypoints_3d": (n, 24, 3),
        "camera": (n, 4),
        "pose": (n, 3, 4),
        "world_pose": (n, 3, 4),
        "attitude": (n, 3),
        "light": (n, 10),
        "airframe": (n,),
        "setting": (n,),
        "ground": (n,),
    }
    meta = json.loads(json.dumps(batch["meta"]))
    assert meta["keypoints"] == list(KEYPOINTS)
    assert len(meta["airframes"]) == 6
    np.testing.assert_allclose(np.linalg.norm(batch["extras"]["light"][:, :3], axis=1), 1.0, atol=1e-5)


def test_keypoints_lie_inside_and_the_aircraft_fills_the_frame(batch: dict) -> None:
    uv = batch["targets"].reshape(-1, 24, 2)
    assert uv.min() > 1
    assert uv.max() < 63
    extent = (uv.max(1) - uv.min(1)).max(1) / 64
    assert extent.min() > 0.5
    assert extent.max() < 0.70
    centre = (uv.max(1) + uv.min(1)) / 2
    assert (centre.std(0) > 1.5).all()  # its place varies


def test_the_camera_stands_above_the_aircraft_and_has_a_long_lens(batch: dict, scenes: list[Scene]) -> None:
    up = {name: [] for name in ("apron", "approach", "cruise")}
    for scene in scenes:
        up[scene.setting].append(math.degrees(math.asin(-scene.rotation[2][2])))
    assert all(16 <= angle <= 34 for name in ("apron", "approach") for angle in up[name])
    assert 5 <= min(up["cruise"]) < 10  # close to level: the horizon is in the picture
    assert max(up["cruise"]) <= 28
    focal = batch["extras"]["camera"][:, 0] / 64
    assert focal.min() >= 2.0
    assert focal.max() <= 3.0
    # Moderate pitch and roll in the air, none on the ground.
    turned = np.degrees(np.abs(batch["extras"]["attitude"][:, 1:]))
    parked = batch["extras"]["setting"] == 0
    assert (turned[parked] == 0).all()
    assert (turned <= [12, 18]).all()
    assert (turned[~parked].max(0) > [6, 9]).all()


def test_every_airframe_setting_and_a_range_of_light_occur(batch: dict) -> None:
    extras, images = batch["extras"], batch["images"]
    counts = dict(zip(AIRFRAMES, np.bincount(extras["airframe"], minlength=6), strict=True))
    assert min(counts.values()) > 8
    assert max(counts, key=lambda name: counts[name]) == "twin_narrow_body"
    assert (np.bincount(extras["setting"], minlength=3) > 25).all()
    brightness = images.mean((1, 2, 3))
    assert brightness.min() < 60
    assert brightness.max() > 190
    assert 90 < brightness.mean() < 150
    # Brightness and contrast changes clip at once in these images.
    at_white, at_black = (images == 255).any((1, 2, 3)).mean(), (images == 0).any((1, 2, 3)).mean()
    assert at_white > 0.15
    assert at_black > 0.3
    assert images.std((1, 2)).mean(1).min() > 2  # nowhere a blank picture
    seen = extras["visibility"].mean(0)
    assert (seen > 0.02).all()
    assert 0.4 < seen.mean() < 0.9


def test_an_image_depends_on_seed_split_and_index_alone(batch: dict) -> None:
    short = aircraft.render_split("train", workers=1, limit=3, size="paper")
    assert (short["images"] == batch["images"][:3]).all()
    lone = render(aircraft.sample_scene(0, "train", 137), 64)
    assert (lone.image == batch["images"][137]).all()
    assert (lone.keypoints.reshape(-1).astype(np.float32) == batch["targets"][137]).all()
    other = aircraft.render_split("train", workers=1, limit=3, seed=1)
    assert (other["images"] != batch["images"][:3]).any((1, 2, 3)).all()


def test_workers_change_nothing_and_progress_counts_up(batch: dict) -> None:
    calls: list[tuple[int, int]] = []
    apart = aircraft.render_split(
        "train", workers=2, limit=60, progress=lambda done, total: calls.append((done, total))
    )
    assert (apart["images"] == batch["images"][:60]).all()
    assert (apart["targets"] == batch["targets"][:60]).all()
    for name, array in apart["extras"].items():
        assert (array == batch["extras"][name][:60]).all(), name
    assert [t for _, t in calls] == [60] * len(calls)
    assert calls == sorted(calls)
    assert calls[-1] == (60, 60)


def test_an_error_in_the_progress_callback_reaches_the_caller() -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        aircraft.render_split("val", workers=1, limit=2, progress=stop)


def test_splits_share_no_image(batch: dict) -> None:
    heads = {split: aircraft.render_split(split, workers=1, limit=8)["images"] for split in ("val", "test")}
    pictures = [im.tobytes() for im in (*batch["images"], *heads["val"], *heads["test"])]
    assert len(set(pictures)) == len(pictures)


def test_sizes_are_those_of_the_paper() -> None:
    assert aircraft.SIZES["quick"] == {"train": 2000, "val": 300, "test": 154}
    assert aircraft.SIZES["paper"] == {"train": 8000, "val": 800, "test": 154}


def test_other_image_sizes_scale_the_targets(scenes: list[Scene]) -> None:
    small, large = render(scenes[5], 32), render(scenes[5], 96)
    np.testing.assert_allclose(large.keypoints, 3 * small.keypoints, atol=1e-9)
    assert large.image.shape == (96, 96, 3)
    assert (small.visible == large.visible).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid"}, "did you mean 'val'"),
        ({"split": "train", "size": "huge"}, "expected one of quick, paper"),
        ({"split": "train", "image_size": 8}, "at least 16"),
        ({"split": "train", "workers": 0}, "workers must be at least 1"),
        ({"split": "train", "limit": 0}, "limit must be at least 1"),
        ({"split": "train", "seed": -1}, "non-negative"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aircraft.render_split(**arguments)


def test_throughput_is_a_rate() -> None:
    assert aircraft.throughput(4) > 1
    with pytest.raises(ValueError, match="at least 1"):
        aircraft.throughput(0)
