"""Takes the machine code of all GPUs but one kind out of shared libraries, so that they compress to a fraction.

    python thin.py sm_90 OUT LIBRARY…      writes OUT/<library>; the files keep their size and load as before

A CUDA library holds its kernels several times over, once for each kind of GPU, in containers that begin with a magic number.
Each container has a header (magic, version, header's size, size of all that follows) and records (kind, version, header's
size, size of the code, …, architecture at byte 28). Records of other architectures are overwritten with zeros. ONNX
Runtime's CUDA provider goes from 177 MiB to about 49 MiB under `xz -9`.
"""
import os
import struct
import sys

MAGIC = struct.pack("<I", 0xBA55ED50)
CONTAINER, RECORD = struct.Struct("<IHHQ"), struct.Struct("<HHIQ")
ARCHITECTURE = 28


def records(code, start):
    """Architecture and place of the code of each record of the container at `start`; None if it is none."""
    _, version, header, size = CONTAINER.unpack_from(code, start)
    at, end = start + header, start + header + size
    if version != 1 or header != CONTAINER.size or end > len(code):
        return None
    found = []
    while at < end:
        _, _, header, size = RECORD.unpack_from(code, at)
        first, last = at + header, at + header + size
        if header < ARCHITECTURE + 4 or last > end:
            return None
        found.append((struct.unpack_from("<I", code, at + ARCHITECTURE)[0], first, last))
        at = last
    return found


def thin(code, kept):
    """Bytes of code that stay and go, by architecture."""
    sizes, at = {}, code.find(MAGIC)
    while at >= 0:
        found = records(code, at)
        for architecture, first, last in found or []:
            sizes[architecture] = sizes.get(architecture, 0) + last - first
            if architecture != kept:
                code[first:last] = bytes(last - first)
        at = code.find(MAGIC, found[-1][2] if found else at + len(MAGIC))
    return sizes


def main():
    if len(sys.argv) < 4 or not sys.argv[1].startswith("sm_"):
        sys.exit(__doc__)
    kept, out = int(sys.argv[1][3:]), sys.argv[2]
    os.makedirs(out, exist_ok=True)
    for path in sys.argv[3:]:
        with open(path, "rb") as file:
            code = bytearray(file.read())
        sizes = thin(code, kept)
        if sizes and kept not in sizes:
            sys.exit(f"{path} has no code for sm_{kept}, only for {', '.join(f'sm_{a}' for a in sorted(sizes))}")
        with open(os.path.join(out, os.path.basename(path)), "wb") as file:
            file.write(code)
        words = ", ".join(f"sm_{a} {n / 2**20:.1f} MiB {'kept' if a == kept else 'gone'}" for a, n in sorted(sizes.items()))
        print(f"{path}: {words or 'no code for GPUs'}")


if __name__ == "__main__":
    main()
