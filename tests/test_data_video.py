import gc
import io
import os
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vidtrl.data.video import cover_size, probe_video, read_video, resize_crop, write_video
from vidtrl.toy import world


CLIP = world.render("a red circle moving right")  # (17, 3, 64, 64)


def grey_levels(n, size=32):
    """Frames whose brightness tells their number: 0, 5, 10, ..."""
    return (torch.arange(n) * 5).to(torch.uint8).view(n, 1, 1, 1).expand(n, 3, size, size).contiguous()


def numbers(frames):
    """Invert `grey_levels`."""
    return (frames.float().mean((1, 2, 3)) / 5).round().int().tolist()


def encode(frames, format="mp4", codec="libx264", rate=24, times_ms=None, rotation=0, aspect=None, options=None):
    """A video file in memory, with what `write_video` does not offer."""
    buffer = io.BytesIO()
    height, width = frames.shape[2:]
    with av.open(buffer, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = width, height, "yuv420p", 1
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if codec == "mpeg4":
            stream.bit_rate = 2_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        if times_ms:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, image in enumerate(frames.permute(0, 2, 3, 1).numpy()):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format="yuv420p", threads=1)
            if times_ms:
                frame.pts, frame.time_base = times_ms[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def toy_mp4():
    buffer = io.BytesIO()
    write_video(buffer, CLIP, fps=8)
    return buffer.getvalue()


def test_round_trip(tmp_path):
    write_video(tmp_path / "clip.mp4", CLIP, fps=8)
    info = probe_video(tmp_path / "clip.mp4")
    assert (info.num_frames, info.fps, info.height, info.width, info.duration) == (17, 8, 64, 64, 2.125)
    back = read_video(tmp_path / "clip.mp4")
    assert back.dtype == torch.uint8 and back.shape == CLIP.shape
    assert (back.float() - CLIP.float()).abs().mean() < 1.5
    assert (back.roll(1, 0).float() - CLIP.float()).abs().mean() > 3  # the limit tells frames apart


def test_the_same_frames_give_the_same_bytes():
    """x264 left to itself chooses otherwise now and then: in 8 of 100 such clips."""
    for i in range(40):
        clip, files = world.render(world.captions()[i], seed=i), set()
        for _ in range(3):
            buffer = io.BytesIO()
            write_video(buffer, clip, fps=8)
            files.add(buffer.getvalue())
        assert len(files) == 1, i


def test_float_frames_and_colours_survive(tmp_path):
    colours = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.8, 0.2], [0.2, 0.3, 0.9], [0.5, 0.5, 0.5]])
    write_video(tmp_path / "c.mp4", colours.view(4, 3, 1, 1).expand(4, 3, 32, 32), fps=4)
    with av.open(str(tmp_path / "c.mp4")) as container:
        assert container.streams.video[0].codec_context.colorspace == 1  # tagged BT.709
    back = read_video(tmp_path / "c.mp4").float().mean((2, 3)) / 255
    assert (back - colours).abs().max() < 0.02


def test_odd_size(tmp_path):
    write_video(tmp_path / "c.mp4", CLIP[:, :, :63, :31], fps=8)
    assert read_video(tmp_path / "c.mp4").shape == (17, 3, 63, 31)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (4, 8, 8, 3), (3, 8, 8)])
def test_write_video_refuses_other_shapes(tmp_path, shape):
    with pytest.raises(ValueError, match=r"\(F, 3, H, W\)"):
        write_video(tmp_path / "c.mp4", torch.zeros(shape), fps=8)


def test_write_video_refuses_a_frame_rate_of_zero(tmp_path):
    with pytest.raises(ValueError, match="fps must be positive"):
        write_video(tmp_path / "c.mp4", CLIP, fps=0)


@pytest.mark.parametrize(
    ("format", "codec"),
    [
        ("mp4", "libx264"),
        ("mov", "libx264"),
        ("matroska", "libx264"),
        ("webm", "libvpx-vp9"),
        ("avi", "libx264"),
        ("avi", "mpeg4"),
        ("mpegts", "libx264"),
        ("mp4", "libx265"),
    ],
)
def test_containers(format, codec):
    options = {"libx265": {"x265-params": "log-level=none"}, "libvpx-vp9": {"cpu-used": "8"}}
    data = encode(grey_levels(36), format, codec, rate=24, options=options.get(codec))
    info = probe_video(data)
    assert (info.num_frames, info.fps) == (36, 24)
    assert numbers(read_video(data)) == list(range(36))
    assert numbers(read_video(data, start=20, num_frames=9)) == list(range(20, 29))
    assert info.frames_at(8) == 12
    assert numbers(read_video(data, fps=8)) == list(range(0, 36, 3))  # every third frame
    assert numbers(read_video(data, start=2, num_frames=3, fps=8)) == [6, 9, 12]


def test_higher_target_repeats_frames(toy_mp4):
    doubled = read_video(toy_mp4, fps=16)
    assert torch.equal(doubled, read_video(toy_mp4).repeat_interleave(2, 0))


def test_variable_frame_rate_goes_by_time():
    # 10 frames a second, then 50 frames a second: by index, "every n-th frame" would be wrong
    times = [*range(0, 1000, 100), *range(1000, 1800, 20)]
    for format in ("mp4", "matroska"):
        data = encode(grey_levels(50), format, rate=50, times_ms=times)
        assert numbers(read_video(data)) == list(range(50))
        got = numbers(read_video(data, fps=10, num_frames=18))
        assert got == [*range(10), *range(10, 50, 5)]
        by_index = np.linspace(0, 49, 18).round().astype(int).tolist()
        assert got != by_index


@settings(max_examples=60, deadline=None)
@given(source=st.integers(1, 60), target=st.integers(1, 60), n=st.integers(1, 40), start=st.integers(0, 5))
def test_resampling_takes_the_frame_on_screen(source, target, n, start):
    frames = grey_levels(n, size=2)
    available = probe_video(frames, fps=source).frames_at(target)
    if start >= available:
        with pytest.raises(ValueError, match="were requested"):
            read_video(frames, start=start, num_frames=1, fps=target, source_fps=source)
        return
    got = numbers(read_video(frames, start=start, fps=target, source_fps=source))
    assert len(got) == available - start
    slack = Fraction(1, 10 * max(source, target))
    for k, frame in enumerate(got):
        # a time that falls exactly on a frame's edge may round either way
        edges = {
            min(n - 1, int((Fraction(start + k, target) + slack * (1 + tiny)) * source))
            for tiny in (Fraction(-1, 10**6), Fraction(1, 10**6))
        }
        assert frame in edges
    assert abs(available / target - n / source) < 1 / target  # the duration is kept


@pytest.mark.parametrize("window", [(0, 18), (10, 8), (17, 1), (-1, 3), (0, 0)])
def test_window_outside_the_clip(toy_mp4, window):
    start, num_frames = window
    with pytest.raises(ValueError, match="has 17 frames.*were requested"):
        read_video(toy_mp4, start=start, num_frames=num_frames)


def test_every_kind_of_source_gives_the_same_frames(tmp_path, toy_mp4):
    (tmp_path / "CLIP.MP4").write_bytes(toy_mp4)
    path, want = tmp_path / "CLIP.MP4", read_video(toy_mp4)
    images = [Image.fromarray(f) for f in want.permute(0, 2, 3, 1).numpy()]
    sources = [
        path,
        str(path),
        {"path": str(path), "bytes": None},
        {"path": None, "bytes": toy_mp4},
        bytearray(toy_mp4),
    ]
    sources += [want, want.numpy(), want.permute(0, 2, 3, 1), want.float() / 255, list(want), images]
    for source in sources:
        assert torch.equal(read_video(source, start=3, num_frames=5), want[3:8])
        info = probe_video(source)
        assert (info.num_frames, info.height, info.width) == (17, 64, 64)
    assert probe_video(images).fps is None and probe_video(images, fps=8).duration == 17 / 8


def test_torchcodec_decoder_objects(toy_mp4):
    """What torchcodec's VideoDecoder offers, in a class of that module: the package itself is optional."""
    frames = read_video(toy_mp4)

    class VideoDecoder:
        metadata = SimpleNamespace(
            num_frames=17, average_fps=8.0, height=64, width=64, duration_seconds=2.125,
            begin_stream_seconds=0.0, end_stream_seconds=2.125,
        )  # fmt: skip

        def get_frames_at(self, indices):
            return SimpleNamespace(data=frames[indices])

        def get_frames_played_at(self, seconds):
            assert max(seconds) < 2.125
            return SimpleNamespace(data=frames[[int(s * 8) for s in seconds]])

    VideoDecoder.__module__ = "torchcodec.decoders._video_decoder"
    assert torch.equal(read_video(VideoDecoder(), start=2, num_frames=4), frames[2:6])
    assert torch.equal(read_video(VideoDecoder(), fps=4), frames[::2])
    assert probe_video(VideoDecoder()).num_frames == 17


def test_images_are_one_frame_videos(tmp_path):
    image = Image.fromarray(CLIP[8].permute(1, 2, 0).numpy()).crop((0, 0, 64, 48))
    image.save(tmp_path / "a.PNG")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # the camera was held upright
    image.save(tmp_path / "b.jpg", exif=rotated)
    for source in (tmp_path / "a.PNG", (tmp_path / "a.PNG").read_bytes(), image, [image]):
        assert torch.equal(read_video(source), CLIP[8:9, :, :48])
        assert probe_video(source).num_frames == 1
    for source in (tmp_path / "b.jpg", (tmp_path / "b.jpg").read_bytes(), Image.open(tmp_path / "b.jpg")):
        assert read_video(source).shape == (1, 3, 64, 48)
        assert (probe_video(source).height, probe_video(source).width) == (64, 48)
    (tmp_path / "c.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"c\.png cannot be read as an image"):
        probe_video(tmp_path / "c.png")


def test_animated_gif(tmp_path):
    images = [Image.fromarray(f) for f in CLIP[:6].permute(0, 2, 3, 1).numpy()]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100)
    assert probe_video(tmp_path / "a.gif").fps == pytest.approx(10)
    assert (read_video(tmp_path / "a.gif").float() - CLIP[:6].float()).abs().mean() < 3


def test_rotation_and_pixel_aspect():
    frames = torch.zeros(4, 3, 32, 64, dtype=torch.uint8)
    frames[..., :16] = 255  # bright on the left
    data = encode(frames, rotation=90)
    assert (probe_video(data).height, probe_video(data).width) == (64, 32)
    turned = read_video(data).float()
    assert turned.shape == (4, 3, 64, 32)
    ends = turned[:, :, :16].mean(), turned[:, :, -16:].mean()
    assert max(ends) > 200 and min(ends) < 50  # the bright side is now at the top or the bottom
    wide = encode(frames, aspect=Fraction(3, 2))
    assert (probe_video(wide).height, probe_video(wide).width) == (32, 96)
    assert read_video(wide).shape == (4, 3, 32, 96)


def test_probing_does_not_decode_the_file(toy_mp4):
    long = encode(grey_levels(51), options={"g": "10"})
    middle = len(long) // 2
    damaged = long[: middle - 200] + bytes(400) + long[middle + 200 :]
    assert probe_video(damaged) == probe_video(long)
    with pytest.raises(ValueError, match="is damaged"):
        read_video(damaged)
    assert numbers(read_video(long)) == list(range(51))


def test_unreadable_files(tmp_path, toy_mp4):
    with av.open(io.BytesIO(toy_mp4)) as source:  # the header in front, so that a truncated file still opens
        with av.open(str(tmp_path / "whole.mp4"), "w", options={"movflags": "faststart"}) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
    fast = (tmp_path / "whole.mp4").read_bytes()
    assert fast.index(b"moov") < fast.index(b"mdat") and probe_video(fast).num_frames == 17
    cases = {
        "empty.mp4": (b"", "it is empty"),
        "text.mp4": (b"hello " * 100, "cannot be read as a video"),
        "half.mp4": (toy_mp4[: len(toy_mp4) // 2], "truncated"),
        "fast.mp4": (fast[:-200], "truncated"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        for source in (tmp_path / name, data):
            with pytest.raises(ValueError, match=message) as error:
                probe_video(source)
            if source is not data:
                assert name in str(error.value)
    with pytest.raises(ValueError, match="No such file"):
        probe_video(tmp_path / "missing.mp4")
    for nothing in (None, [], {"path": None, "bytes": None}, 3):
        with pytest.raises(ValueError, match="cannot read a video from"):
            probe_video(nothing)
    with pytest.raises(ValueError, match="one size"):
        read_video([np.zeros((4, 4, 3)), np.zeros((4, 5, 3))])
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="no video stream"):
        probe_video(sound.getvalue())


def test_a_file_cannot_pull_in_other_files(tmp_path):
    """A play list named by a data set must not make FFmpeg open paths or URLs."""
    (tmp_path / "secret.ts").write_bytes(encode(CLIP, "mpegts"))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.0,\n{tmp_path / 'secret.ts'}\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    with av.open(str(tmp_path / "list.m3u8")) as container:  # what FFmpeg does when it is let
        assert len(list(container.decode(video=0))) == 17
    for source in (tmp_path / "list.m3u8", playlist.encode()):
        with pytest.raises(ValueError, match="cannot be read as a video"):
            read_video(source)


def test_resize_crop():
    assert torch.equal(resize_crop(CLIP, 64, 64), CLIP.float() / 255)
    out = resize_crop(CLIP, 32, 48)
    assert out.shape == (17, 3, 32, 48) and out.dtype == torch.float32 and 0 <= out.min() and out.max() <= 1
    noise = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.manual_seed(0), dtype=torch.uint8)
    small = resize_crop(noise, 16, 16)
    assert small.std() < 0.07 < 0.1 < resize_crop(noise, 64, 64).std()  # antialiased; else 0.14
    exact = torch.nn.functional.interpolate(noise.float() / 255, (16, 16), mode="bilinear", antialias=True)
    assert (small - exact).abs().max() <= 1.01 / 255
    centre = torch.zeros(1, 3, 32, 64, dtype=torch.uint8)
    centre[..., 16:48] = 255
    assert resize_crop(centre, 32, 32).min() == 1  # the centre is what is left


@settings(max_examples=100, deadline=None)
@given(*[st.integers(1, 4000)] * 4)
def test_cover_size_covers_and_touches(source_height, source_width, height, width):
    h, w = cover_size(source_height, source_width, height, width)
    assert h >= height and w >= width and (h == height or w == width)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_no_file_stays_open(tmp_path, toy_mp4):
    (tmp_path / "a.mp4").write_bytes(toy_mp4)
    (tmp_path / "b.mp4").write_bytes(b"broken")
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            read_video(tmp_path / "a.mp4", fps=4)
            with pytest.raises(ValueError):
                read_video(tmp_path / "b.mp4")
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()
