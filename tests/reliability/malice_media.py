"""Malicious pictures and videos, see `malice`."""

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tests.data.pictures import overlapping_tags, run_lengths, tiff
from tests.reliability.malice import SECRET_COLOUR, Case, Place, chunk
from tests.reliability.scale import size

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def picture(form: str, shape: tuple[int, int] = (64, 48), **options: object) -> bytes:
    """A harmless picture."""
    rows, columns = np.indices(shape[::-1])
    grey = ((rows * 3 + columns * 5) % 256).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(np.stack([grey, grey[::-1], 255 - grey], axis=2)).save(out, form, **options)
    return out.getvalue()


def header(width: int, height: int, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    """The first chunk of a PNG file."""
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def png(
    *chunks: bytes, width: int = 4, height: int = 4, depth: int = 8, colour: int = 2, data: bytes | None = None
) -> bytes:
    """A PNG file with further chunks before its data."""
    packed = zlib.compress(bytes((width * 3 + 1) * height) if data is None else data)
    return (
        SIGNATURE
        + header(width, height, depth, colour)
        + b"".join(chunks)
        + chunk(b"IDAT", packed)
        + chunk(b"IEND", b"")
    )


def jpeg_with_size(width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    data = bytearray(picture("JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_of_scans(scans: int, side: int = 8000) -> bytes:
    """A progressive JPEG of one grey colour that is gone over again and again."""
    frame = struct.pack(">BHHB3B", 8, side, side, 1, 1, 0x11, 0)
    table = bytes([0x10, 1, *([0] * 15), 0xE0])
    quant = b"\0" + b"\1" * 64
    parts = [b"\xff\xd8", _segment(0xDB, quant), _segment(0xC2, frame)]
    parts.append(_segment(0xC4, bytes([0x00, 1, *([0] * 15), 0])))
    first = _segment(0xDA, bytes([1, 1, 0x00, 0, 0, 0x01])) + b"\0" * 16
    parts.append(first)
    parts.append(_segment(0xC4, table))
    # One code, a single 0 bit: the end of band of 2**14 + the 14 bits that follow, blocks.
    again = _segment(0xDA, bytes([1, 1, 0x00, 1, 63, 0x00])) + (b"\x7f\xff\x00\x00" * 40)
    parts += [again] * scans
    return b"".join(parts) + b"\xff\xd9"


def _segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP file of these chunks."""
    body = b"".join(kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def exif_loop() -> bytes:
    """An EXIF block whose directories lead to one another."""
    entry = struct.pack("<HHII", 0x8769, 4, 1, 8) + struct.pack("<HHII", 0x0112, 3, 1 << 30, 8)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + struct.pack("<H", 2) + entry + struct.pack("<I", 8)


def picture_files(place: Place) -> Iterator[tuple[str, bytes, bool]]:
    """(name, content, whether it must be refused)."""
    yield "png_60000.png", png(width=60000, height=60000, data=b""), True
    yield "png_2_billion.png", png(width=2**31 - 1, height=2**31 - 1, data=b""), True
    yield "png_line.png", png(width=80_000_001, height=1, data=b""), True
    yield "png_bomb.png", png(data=bytes(100_000_000)), False
    text = zlib.compress(bytes(60_000_000), 1)
    yield "png_ztxt.png", png(chunk(b"zTXt", b"a\0\0" + text)), True
    yield "png_itxt.png", png(chunk(b"iTXt", b"a\0\1\0\0\0" + text)), True
    yield "png_iccp.png", png(chunk(b"iCCP", b"a\0\0" + text)), False
    yield (
        "png_many_texts.png",
        png(*[chunk(b"zTXt", b"a%d\0\0" % i + zlib.compress(bytes(900_000))) for i in range(300)]),
        True,
    )
    yield "png_chunk_length.png", SIGNATURE + header(4, 4) + struct.pack(">I", 2**31 - 1) + b"tEXt" + b"a" * 50, True
    yield (
        "png_animated.png",
        png(
            chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)),
            chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 60000, 60000, 0, 0, 1, 1, 0, 0)),
        ),
        False,
    )
    side = size(3000, 8900)
    yield "png_16_bits.png", png(width=side, height=side, depth=16, colour=0, data=bytes((side * 2 + 1) * side)), False
    yield "jpeg_65500.jpg", jpeg_with_size(65500, 65500), True
    yield "jpeg_2000_scans.jpg", jpeg_of_scans(2000), True
    loop = exif_loop()
    yield "jpeg_exif_loop.jpg", picture("JPEG")[:2] + _segment(0xE1, loop) + picture("JPEG")[2:], False
    segments = _segment(0xE1, b"Exif\0\0" + b"a" * 60_000) * 50
    yield "jpeg_3_megabytes_of_exif.jpg", picture("JPEG")[:2] + segments + picture("JPEG")[2:], False
    mpf = (
        b"MPF\0II*\0"
        + struct.pack("<I", 8)
        + struct.pack("<H", 1)
        + struct.pack("<HHII", 0xB001, 4, 1, 1 << 30)
        + b"\0" * 4
    )
    yield "jpeg_mpf.jpg", picture("JPEG")[:2] + _segment(0xE2, mpf) + picture("JPEG")[2:], False
    yield "jpeg_cut.jpg", picture("JPEG", (400, 300))[:900], True
    canvas = struct.pack("<I", 0x02) + (16382).to_bytes(3, "little") * 2
    frame = bytes(6) + (63).to_bytes(3, "little") * 2 + bytes(4) + picture("WEBP")[12:]
    yield "webp_canvas.webp", webp((b"VP8X", canvas), (b"ANIM", bytes(6)), (b"ANMF", frame)), True
    lossless = b"\x2f" + ((16383) | (16383 << 14)).to_bytes(4, "little") + bytes(20)
    yield "webp_lossless.webp", webp((b"VP8L", lossless)), True
    yield "webp_riff_length.webp", b"RIFF\xff\xff\xff\xffWEBP" + picture("WEBP")[12:], False
    url = place.url
    svg = f'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd"><!ENTITY c SYSTEM "{url}">]>'
    yield "svg.png", (svg + f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{url}"/>&b;&c;</svg>').encode(), True
    yield (
        "eps.jpg",
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch x) (w) file\nshowpage\n%%EOF\n"),
        True,
    )
    yield "pdf.jpg", b"%PDF-1.4\n1 0 obj<</Type/Catalog/OpenAction<</S/URI/URI(" + url.encode() + b")>>>>endobj\n", True
    yield "msl.png", f'<image><read filename="{place.folder / "secret.png"}"/></image>'.encode(), True
    yield "psd.png", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30000, 30000, 8, 3) + bytes(40), True
    yield "tiff_60000.tif", tiff(60000, 60000, 8, bytes(99)), True
    yield "tiff_tags.tif", overlapping_tags(size(5000, 60_000), 500_000), True
    yield "tiff_cut.tif", tiff(side, side, 8, bytes(99)), True
    yield "tiff_bomb.tif", picture("TIFF", (3000, 3000), compression="tiff_adobe_deflate"), False
    bitmap, animation = picture("BMP"), picture("GIF")
    yield "bmp_60000.bmp", bitmap[:18] + struct.pack("<ii", 60000, 60000) + bitmap[26:], True
    yield "bmp_rows.bmp", run_lengths(8_000_000, 1), True
    yield "bmp_ends_of_lines.bmp", run_lengths(2800, 2800, b"\0\0" * 2800), False
    yield "gif_canvas.gif", animation[:6] + b"\xff\xff" * 2 + animation[10:], True
    frame = animation.index(b",", 13 + 3 * 2 ** (1 + (animation[10] & 7)))
    yield "gif_frame.gif", animation[: frame + 5] + b"\xff\xff" * 2 + animation[frame + 9 :], True
    for form in ("GIF", "TIFF", "BMP"):
        yield f"{form.lower()}.jpg", picture(form), False
    for form in ("ICO", "PPM", "TGA", "PCX", "ICNS", "JPEG2000", "DDS", "SGI"):
        yield f"{form.lower()}.jpg", picture(form), True
    yield "text.jpg", b"#!/bin/sh\ntouch x\n", True
    yield "page.jpg", b"<html><script src=" + url.encode() + b"></script>", True


def images(place: Place) -> Iterator[Case]:
    """What `read_image` and `read_tensor` must not fall for."""
    red, green, blue = SECRET_COLOUR
    Image.new("RGB", (64, 48), (red, green, blue)).save(place.folder / "secret.png")
    for name, content, refused in picture_files(place):
        yield Case(f"image_{name}", "image", place.write(f"img/{name}", content), refused)
    (place.folder / "img" / "zero.jpg").symlink_to("/dev/zero")
    yield Case("image_device", "image", str(place.folder / "img" / "zero.jpg"))
    yield Case("image_url", "image", place.url)


# --- videos ---


def movie(path: Path, colour: tuple[int, int, int], codec: str = "libx264", frames: int = 6, **options: str) -> bytes:
    """A video of one colour."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = 64, 48, "yuv420p", 1
        image = np.broadcast_to(np.array(colour, np.uint8), (48, 64, 3))
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode(None))
    return path.read_bytes()


def box(kind: bytes, *parts: bytes) -> bytes:
    """A box of an MP4 file."""
    body = b"".join(parts)
    return struct.pack(">I", len(body) + 8) + kind + body


def with_reference(data: bytes, kind: bytes, target: bytes) -> bytes:
    """An MP4 whose samples are said to lie in another file: its self-contained entry is replaced."""
    entry = box(b"url ", b"\0\0\0\1")
    assert data.count(entry) == 1
    new = box(kind, b"\0\0\0\0", target)
    grown = len(new) - len(entry)
    out = data.replace(entry, new)
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        place = out.index(name) - 4
        (length,) = struct.unpack(">I", out[place : place + 4])
        out = out[:place] + struct.pack(">I", length + grown) + out[place + 4 :]
    return out


def with_table(data: bytes, kind: bytes, count: int) -> bytes:
    """An MP4 one of whose tables claims a number of entries."""
    place = data.index(kind) + (12 if kind == b"stsz" else 8)
    return data[:place] + struct.pack(">I", count) + data[place + 4 :]


def alias(path: str) -> bytes:
    """A Macintosh alias record with a POSIX path, as QuickTime's alis entries have it."""
    name = path.encode()
    head = bytes(4) + struct.pack(">HH", 150, 2) + bytes(2) + b"\4disk".ljust(28, b"\0") + bytes(12)
    head += bytes([min(len(name), 63)]) + name[:63].ljust(63, b"\0") + bytes(16) + struct.pack(">hh", 1, 1) + bytes(16)
    return head + struct.pack(">HH", 18, len(name)) + name + b"\0" * (len(name) % 2) + struct.pack(">H", 0xFFFF)


def ebml(identity: bytes, body: bytes) -> bytes:
    """An element of a Matroska file."""
    return identity + struct.pack(">Q", len(body) | 1 << 56) + body


def playlists(place: Place) -> dict[str, str]:
    """Texts that refer to the secret and to the counted port."""
    secret = place.folder / "secret.mp4"
    texts: dict[str, str] = {}
    for kind, target in {"file": str(secret), "url": place.url, "file_url": f"file://{secret}"}.items():
        texts |= {
            f"hls_{kind}.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n",
            f"hls_key_{kind}.m3u8": f'#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{target}"\n#EXTINF:10,\n{target}\n',
            f"hls_master_{kind}.m3u8": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{target}\n",
            f"concat_{kind}.ffconcat": f"ffconcat version 1.0\nfile '{target}'\n",
            f"dash_{kind}.mpd": (
                '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
                f'<Representation id="1" bandwidth="1" mimeType="video/mp4"><BaseURL>{target}</BaseURL>'
                "</Representation></AdaptationSet></Period></MPD>"
            ),
            f"rtsp_{kind}.mov": f"RTSPtext\r\n{target}\r\n",
            f"smil_{kind}.smil": f'<smil><body><video src="{target}"/></body></smil>',
            f"asx_{kind}.asx": f'<asx version="3.0"><entry><ref href="{target}"/></entry></asx>',
            f"pls_{kind}.pls": f"[playlist]\nFile1={target}\nNumberOfEntries=1\n",
            f"lavfi_{kind}.mp4": f"movie={target}",
        }
    texts["sdp.sdp"] = f"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video {place.port} RTP/AVP 96\n"
    texts["imf.xml"] = (
        f'<AssetMap xmlns="http://www.smpte-ra.org/schemas/429-9/2007/AM"><Path>{secret}</Path></AssetMap>'
    )
    texts["idx.idx"] = "# VobSub index file, v7\nid: en, index: 0\ntimestamp: 00:00:00:000, filepos: 000000000\n"
    return texts


def containers(place: Place) -> Iterator[tuple[str, bytes, bool]]:
    """(name, content, whether it must be refused)."""
    secret = str(place.folder / "secret.mp4")
    plain = movie(place.folder / "plain.mp4", (40, 200, 40))
    for kind, target in {
        b"url ": f"file://{secret}\0".encode(),
        b"alis": alias(secret),
        b"rsrc": alias(secret),
    }.items():
        yield f"dref_{kind.decode().strip()}.mp4", with_reference(plain, kind, target), False
    yield "dref_http.mp4", with_reference(plain, b"url ", f"{place.url}\0".encode()), False
    reference = struct.pack(">I", 0) + b"url " + struct.pack(">I", len(secret) + 1) + secret.encode() + b"\0"
    movies = box(b"moov", box(b"rmra", box(b"rmda", box(b"rdrf", reference))))
    yield "reference_movie.mov", box(b"ftyp", b"qt  ", bytes(4)) + movies, True
    yield (
        "zmov.mov",
        box(
            b"moov",
            box(
                b"cmov", box(b"dcom", b"zlib"), box(b"cmvd", struct.pack(">I", 1 << 31), zlib.compress(bytes(1 << 26)))
            ),
        ),
        True,
    )
    for kind in (b"stsz", b"stts", b"stsc", b"stco", b"ctts", b"stss", b"stsd"):
        if kind in plain:
            yield f"table_{kind.decode()}.mp4", with_table(plain, kind, 0x7FFFFFFF), False
    place_of_size = plain.index(b"avc1") + 28
    yield "size_65535.mp4", plain[:place_of_size] + b"\xff\xff\xff\xff" + plain[place_of_size + 4 :], False
    deep = b""
    for _ in range(50_000):
        deep = box(b"moov", deep) if len(deep) < 400_000 else deep
    yield "deep_boxes.mp4", box(b"ftyp", b"isom", bytes(4)) + deep, True
    yield (
        "box_of_terabytes.mp4",
        box(b"ftyp", b"isom", bytes(4)) + struct.pack(">I", 1) + b"moov" + struct.pack(">Q", 1 << 50),
        True,
    )
    head = ebml(b"\x1a\x45\xdf\xa3", ebml(b"\x42\x82", b"matroska"))
    info = ebml(
        b"\x15\x49\xa9\x66", ebml(b"\x3e\x83\xbb", f"file://{secret}".encode()) + ebml(b"\x3e\xb9\x23", bytes(16))
    )
    fonts = b"".join(
        ebml(
            b"\x61\xa7",
            ebml(b"\x46\x6e", b"../../sentinel/font.ttf")
            + ebml(b"\x46\x60", b"font/ttf")
            + ebml(b"\x46\x5c", bytes(1000)),
        )
        for _ in range(20)
    )
    yield "segment_links.mkv", head + ebml(b"\x18\x53\x80\x67", info + ebml(b"\x19\x41\xa4\x69", fonts)), True
    nested = b""
    for _ in range(20_000):
        nested = ebml(b"\x67\xc8", nested) if len(nested) < 200_000 else nested
    yield "deep_tags.mkv", head + ebml(b"\x18\x53\x80\x67", ebml(b"\x12\x54\xc3\x67", ebml(b"\x73\x73", nested))), True
    yield "endless.mkv", head + b"\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff" + b"\xec\x40\x00" * 1000, True
    film = movie(place.folder / "plain.mkv", (40, 200, 40), "mpeg4")
    yield "attachments.mkv", film + ebml(b"\x19\x41\xa4\x69", fonts), False
    riff = movie(place.folder / "plain.avi", (40, 200, 40), "mpeg4")
    yield "subtitles.avi", _with_playlist_subtitles(riff, secret), False
    yield "index.avi", riff.replace(b"idx1", b"indx"), False
    hls = playlists(place)["hls_file.m3u8"].encode()
    yield "playlist_then_video.mp4", hls + plain, True
    yield "video_then_playlist.mp4", plain + hls, False
    yield "playlist_within.ts", b"G" + hls.ljust(187, b"\xff") + hls, True
    yield (
        "flv_of_terabytes.flv",
        b"FLV\1\5\0\0\0\x09\0\0\0\0\x12\xff\xff\xff" + bytes(11) + b"\x02\0\nonMetaData\x08\xff\xff\xff\xff",
        True,
    )
    yield "elf.mp4", b"\x7fELF" + bytes(200), True


def _with_playlist_subtitles(data: bytes, secret: str) -> bytes:
    """An AVI with a GAB2 subtitle block, for which FFmpeg starts a demuxer of its own."""
    text = f"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n".encode()
    block = b"GAB2\0\2\0" + struct.pack("<I", 4) + b"a\0b\0" + struct.pack("<HI", 4, len(text)) + text
    header = struct.pack("<4s4sIHHIIIIIIII8s", b"txts", b"\0\0\0\0", 0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, bytes(8))
    strl = b"strl" + b"strh" + struct.pack("<I", len(header)) + header + b"strf" + struct.pack("<I", 0)
    strl = b"LIST" + struct.pack("<I", len(strl)) + strl
    place = data.index(b"movi") - 8
    length = struct.unpack("<I", data[16:20])[0]
    out = data[:16] + struct.pack("<I", length + len(strl)) + data[20:]
    end_of_header = 20 + length
    out = out[:end_of_header] + strl + out[end_of_header:]
    place += len(strl) + 12
    return out[:place] + b"01tx" + struct.pack("<I", len(block)) + block + out[place:]


def videos(place: Place) -> Iterator[Case]:
    """What both decoders must not fall for."""
    movie(place.folder / "secret.mp4", SECRET_COLOUR)
    for name, text in playlists(place).items():
        for given in (name, f"{name}.mp4"):
            yield Case(f"video_{given}", "video", place.write(f"vid/{given}", text))
    for name, content, refused in containers(place):
        yield Case(f"video_{name}", "video", place.write(f"vid/{name}", content), refused)
    (place.folder / "vid" / "zero.mp4").symlink_to("/dev/zero")
    yield Case("video_device", "video", str(place.folder / "vid" / "zero.mp4"))
    for scheme in ("http", "tcp", "rtmp", "concat:http"):
        yield Case(f"video_{scheme}", "video", f"{scheme}://127.0.0.1:{place.port}/a.mp4")
