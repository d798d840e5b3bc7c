"""Camera paths: pose files give the official rays, moves move the right way, what is no pose file is named."""

import pytest
import torch

from animatediff.media.camera_poses import MOVES, move_path, plucker_embedding, read_camera_path
from animatediff.utils import UserError
from tests.families import FOLDER, expected

POSES = FOLDER / "pose.txt"


def test_official_rays():
    path = read_camera_path(POSES)
    assert len(path) == 8
    relative = path.camera_to_world[:1].inverse() @ path.camera_to_world
    assert torch.allclose(relative[:5].float(), expected("cameractrl")["c2w"], atol=1e-6)
    for frames, size, name in ((5, (64, 128), "plucker"), (2, (96, 64), "plucker.96x64")):
        got = plucker_embedding(path.of(torch.arange(frames)), *size)
        assert torch.allclose(got, expected("cameractrl")[name], atol=2e-6)
    three = plucker_embedding(path.of(torch.arange(3)), 64, 128)  # where a cross product could take the wrong axis
    assert torch.allclose(three, expected("cameractrl")["plucker"][:3], atol=2e-6)


def test_the_size_of_the_video_may_stand_in_the_file(tmp_path):
    first, *rows = POSES.read_text().splitlines()
    square = [" ".join([*row.split()[:5], "500", "500", *row.split()[7:]]) for row in rows]
    (tmp_path / "x.txt").write_text("\n".join([first, *square]))
    assert read_camera_path(tmp_path / "x.txt").aspect == 1.0


def seen(move: str, point: tuple[float, float, float]) -> torch.Tensor:
    """Where a point of the first frame's space is seen in the last one: x to the right and y down, and its depth."""
    pose = move_path([move], 9).camera_to_world[-1].inverse()
    x, y, z = (pose @ torch.tensor([*point, 1.0], dtype=torch.float64))[:3].tolist()
    return torch.tensor([x / z, y / z, z])


@pytest.mark.parametrize(
    ("move", "there"),
    [
        ("pan_left", lambda p: p[0] > 0.01 and abs(p[1]) < 1e-9),
        ("pan_right", lambda p: p[0] < -0.01 and abs(p[1]) < 1e-9),
        ("tilt_up", lambda p: p[1] > 0.1 and abs(p[0]) < 1e-9),
        ("tilt_down", lambda p: p[1] < -0.1 and abs(p[0]) < 1e-9),
        ("zoom_in", lambda p: p[2] < 9 and p[:2].abs().max() < 1e-9),
        ("zoom_out", lambda p: p[2] > 11 and p[:2].abs().max() < 1e-9),
    ],
)
def test_what_was_in_the_middle(move, there):
    assert there(seen(move, (0, 0, 10)))


def test_rolls():
    """A camera that rolls clockwise sees what was above to its left."""
    assert seen("roll_clockwise", (0, -5, 10))[0] < -0.1
    assert seen("roll_anticlockwise", (0, -5, 10))[0] > 0.1


def test_moves_add_up_and_have_a_speed():
    both = move_path(["zoom_in", "pan_left"], 16).camera_to_world[:, :3, 3]
    alone = [move_path([m], 16).camera_to_world[:, :3, 3] for m in ("zoom_in", "pan_left")]
    assert torch.allclose(both, sum(alone))
    twice, once = (move_path(["tilt_up"], 17, speed=s).camera_to_world for s in (2, 1))
    assert torch.allclose(twice[8], once[16])
    for move in MOVES:
        assert torch.equal(move_path([move], 3).camera_to_world[0], torch.eye(4, dtype=torch.float64))


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="got the camera move 'zoom', expected one of zoom_in, zoom_out"):
        move_path(["zoom"], 3)
    with pytest.raises(UserError, match="expected a file of camera poses: there is no such file"):
        read_camera_path(tmp_path / "x.txt")
    path = tmp_path / "x.txt"
    path.write_text("https://example.org\n")
    with pytest.raises(UserError, match="without poses, expected a URL in its first line"):
        read_camera_path(path)
    path.write_text("https://example.org\n0 1 2 3\n")
    with pytest.raises(UserError, match="line 2: got '0 1 2 3', expected 19 numbers"):
        read_camera_path(path)
