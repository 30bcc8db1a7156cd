"""Small image files written by hand, for the miniatures: the core dependencies hold no image library."""
import numpy as np

_DCT = np.cos((2 * np.arange(8) + 1) * np.arange(8)[:, None] * np.pi / 16) / 2      # (frequency, place)
_DCT[0] = 8 ** -0.5
_ZIGZAG = sorted(range(64), key=lambda i: (i // 8 + i % 8, i // 8 if (i // 8 + i % 8) % 2 else i % 8))  # by diagonals
_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])    # from R, G, B
_AC_SYMBOLS = [0x00, 0xF0] + [run << 4 | size for run in range(16) for size in range(1, 11)]


def jpeg(pixels, step=8, size=0):
    """A baseline JPEG of uint8 pixels (H, W) or (H, W, 3), as bytes; with size, padded by a comment to that many bytes.

    step is the one quantisation step of all coefficients: larger is smaller and coarser. The Huffman codes have one
    length each (4 bits for DC, 8 for AC), which costs some bytes and saves the tables. Padding keeps the length of
    the file from telling what is in it.
    """
    height, width = pixels.shape[:2]
    planes = pixels.astype(float).reshape(height, width, -1)
    if planes.shape[2] == 3:
        planes = planes @ _YCBCR.T + [0, 128, 128]
    planes = np.pad(planes - 128, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="edge")
    num_planes = planes.shape[2]
    blocks = planes.reshape(planes.shape[0] // 8, 8, planes.shape[1] // 8, 8, num_planes)
    blocks = blocks.transpose(0, 2, 4, 1, 3)        # (rows of blocks, columns of blocks, planes, 8, 8)
    levels = np.rint(_DCT @ blocks @ _DCT.T / step).astype(int).reshape(-1, num_planes, 64)[:, :, _ZIGZAG]
    bits, last = [], [0] * num_planes
    for group in levels.tolist():
        for plane, block in enumerate(group):
            change, last[plane] = block[0] - last[plane], block[0]
            bits.append(f"{change.bit_length():04b}" + _value_bits(change))
            run = 0
            for level in block[1:]:
                if level == 0:
                    run += 1
                    continue
                symbol = _AC_SYMBOLS.index((run % 16) << 4 | level.bit_length())
                bits.append("00000001" * (run // 16) + f"{symbol:08b}" + _value_bits(level))
                run = 0
            if run:
                bits.append("00000000")         # end of block
    bits = "".join(bits)
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    frame = b"\x08" + height.to_bytes(2, "big") + width.to_bytes(2, "big") + bytes([num_planes])
    frame += b"".join(bytes([plane + 1, 0x11, 0]) for plane in range(num_planes))
    head = b"\xff\xd8" + _segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0") + _segment(0xDB, b"\0" + bytes([step]) * 64)
    head += _segment(0xC0, frame)
    head += _segment(0xC4, b"\x00" + bytes([0, 0, 0, 12] + [0] * 12) + bytes(range(12)))
    head += _segment(0xC4, b"\x10" + bytes([0] * 7 + [len(_AC_SYMBOLS)] + [0] * 8) + bytes(_AC_SYMBOLS))
    planes = bytes([num_planes]) + b"".join(bytes([plane + 1, 0]) for plane in range(num_planes))
    scan = _segment(0xDA, planes + b"\0\x3f\0") + scan + b"\xff\xd9"
    if size:
        spare = size - len(head) - len(scan) - 4
        if not 0 <= spare < 65534:
            raise ValueError(f"The image takes {len(head) + len(scan)} bytes and cannot be padded to {size}.")
        head += _segment(0xFE, b" " * spare)
    return head + scan


def _value_bits(value):
    """JPEG's bits of a coefficient: the number itself, or for a negative one all bits turned round; none for 0."""
    length = value.bit_length()
    return f"{value if value > 0 else value + (1 << length) - 1:0{length}b}" if length else ""


def _segment(marker, body):
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body
