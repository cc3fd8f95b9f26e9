#!/usr/bin/env python3
"""Makes legacy (version 1) images of Xen domains, for tests.

Xen has had no writer of this format since 4.6. This one is written from the layout that
the comments of Xen 4.5's tools/libxc/xg_save_restore.h describe, and from nothing in this
project, so that the reader here is not tested against its own idea of the format.

    legacy_image.py --kind hvm -o guest.legacy          a small guest, made from a seed
    legacy_image.py --from guest.save -o guest.legacy   the guest of a version 2 or 3 image
    legacy_image.py --kind pv64 --expect guest.json ... and what its memory is in the end

The same options make the same bytes. --expect writes JSON: of each pfn the type, and
the CRC-32 of its contents where it has any.
"""

import argparse
import json
import random
import struct
import sys
import zlib

PAGE = 4096
XTAB, XALLOC, BROKEN = 0xF, 0xE, 0xD
FILLER = 0xF0000000
BATCH = 1024

VERIFY, VCPU_INFO, TMEM, TMEM_EXTRA, TSC_INFO = -1, -2, -5, -6, -7
LAST_CHECKPOINT, COMPRESSED, COMPRESS, TOOLSTACK = -9, -12, -13, -18
# HVM_PARAM_* -> chunk, in the order in which the saver wrote them.
PARAM_CHUNKS = {34: -14, 12: -3, 27: -15, 28: -16, 29: -17, 15: -4, 17: -8,
                19: -10, 9: -11, 32: -19, 33: -20}
MAGIC = (5, 6, 1)
QEMU = {"old": b"QemuDeviceModelRecord", "0002": b"DeviceModelRecord0002",
        "remus": b"RemusDeviceModelState"}


class Guest:
    """What a domain is made of."""

    def __init__(self, hvm, width=8):
        self.hvm = hvm
        self.width = width          # of a PV guest, in bytes
        self.p2m_size = 0
        self.p2m_frames = []
        self.pages = {}             # pfn -> (type, contents or None)
        self.vcpus = {}             # number -> (basic, extended, xsave)
        self.shared_info = bytes(PAGE)
        self.tsc = (0, 2_000_000, 123_456_789, 1)   # mode, kHz, nsec, incarnation
        self.params = {}
        self.context = b""
        self.qemu = b""
        self.physmap = []           # (phys_offset, start_addr, size, name)


def hvm_context(noise):
    """The shortest context that Xen takes: HEADER, here with noise in it, and END."""
    header = struct.pack("<II", 0x54381286, 1) + noise[:16]
    return struct.pack("<HHI", 1, 0, len(header)) + header + struct.pack("<HHI", 0, 0, 0)


def seeded(kind, seed, pages, vcpus, xsave):
    """A guest made from a seed. Its contents mean nothing."""
    rng = random.Random(f"{kind}/{seed}")
    hvm = kind == "hvm"
    guest = Guest(hvm, 4 if kind == "pv32" else 8)
    guest.p2m_size = pages + pages // 4 + 1
    per_frame = PAGE // guest.width
    frames = (guest.p2m_size + per_frame - 1) // per_frame
    guest.p2m_frames = [rng.randrange(guest.p2m_size) for _ in range(frames)]
    for pfn in rng.sample(range(guest.p2m_size), pages):
        types = [0] * 12 + [XTAB, XALLOC, BROKEN]
        if not hvm:
            types += [1, 2, 3, 4 if guest.width == 8 else 3, 9, 0xA, 0xB, 0xC if guest.width == 8 else 0xB]
        kind_of = rng.choice(types)
        data = None if kind_of >= BROKEN else rng.randbytes(PAGE)
        guest.pages[pfn] = (kind_of, data)
    first = min(guest.pages)
    guest.pages[first] = (0, rng.randbytes(PAGE))
    basic = 0xAF0 if guest.width == 4 else 0x1430
    present = [0] + sorted(rng.sample(range(1, max(vcpus * 40, 2)), vcpus - 1)) if vcpus > 1 else [0]
    for vcpu in present:
        guest.vcpus[vcpu] = (rng.randbytes(basic), rng.randbytes(128), rng.randbytes(xsave))
    guest.shared_info = rng.randbytes(PAGE)
    if hvm:
        guest.params = {index: rng.randrange(1, 1 << 40) for index in (*PARAM_CHUNKS, *MAGIC)}
        guest.context = hvm_context(rng.randbytes(rng.randrange(100, 3000)))
        guest.qemu = b"QEVM" + rng.randbytes(rng.randrange(1, 5000))
        guest.physmap = [(0xF0000000, 0xE0000000 + i * 0x1000, 0x800000, f"vga.{'v' * i}ram")
                         for i in range(rng.randrange(0, 4))]
    return guest


def from_image(path):
    """The guest of an image of version 2 or 3, little endian, bare or wrapped by libxl or xl."""
    data = open(path, "rb").read()
    at = 0
    if data.startswith(b"Xen saved domain, xl format\n \0 \r"):
        at = 48 + struct.unpack_from("<I", data, 44)[0]
    libxl = data[at:at + 8] == b"LibxlFmt"
    if libxl:
        at += 16 + 8
    assert data[at + 8:at + 12] == b"XENF", "no libxc stream"
    guest = Guest(struct.unpack_from("<I", data, at + 24)[0] == 2)
    at += 40

    def records():
        nonlocal at
        while True:
            kind, length = struct.unpack_from("<II", data, at)
            yield kind, memoryview(data)[at + 8:at + 8 + length]
            at += 8 + (length + 7) // 8 * 8
            if kind == 0:
                return

    parts = {}
    for kind, body in records():
        if kind == 1:
            count = struct.unpack_from("<I", body)[0]
            offset = 8 + 8 * count
            for entry in struct.unpack_from(f"<{count}Q", body, 8):
                pfn, page_type = entry & ((1 << 52) - 1), entry >> 60
                contents = None
                if page_type < BROKEN:
                    contents = bytes(body[offset:offset + PAGE])
                    offset += PAGE
                guest.pages[pfn] = (page_type, contents)
        elif kind == 2:
            guest.width = body[0]
        elif kind == 3:
            start, end = struct.unpack_from("<II", body)
            assert start == 0
            guest.p2m_size = end + 1
            guest.p2m_frames = list(struct.unpack(f"<{len(body) // 8 - 1}Q", body[8:]))
        elif kind in (4, 5, 6):
            vcpu = struct.unpack_from("<I", body)[0]
            parts.setdefault(vcpu, {})[kind] = bytes(body[8:])
        elif kind == 7:
            guest.shared_info = bytes(body)
        elif kind == 8:
            guest.tsc = struct.unpack("<IIQII", body)[:4]
        elif kind == 9:
            guest.context = bytes(body)
        elif kind == 10:
            numbers = struct.unpack(f"<{len(body) // 8 - 1}Q", body[8:])
            guest.params.update(zip(numbers[::2], numbers[1::2]))
    for vcpu, part in parts.items():
        # Of the 128 bytes of a legacy stream, Xen has come to write 64.
        guest.vcpus[vcpu] = (part[4], part.get(5, b"").ljust(128, b"\0"), part.get(6, b""))
    if guest.hvm:
        guest.p2m_size = max(guest.pages) + 1
    if libxl:
        for kind, body in records():
            if kind == 3:
                guest.qemu = bytes(body[8:])
    return guest


class Cache:
    """What the sender of Remus remembers: the 8192 pages that were used last."""

    def __init__(self):
        self.pages = {}     # a dict keeps the order of insertion

    def compress(self, pfn, page_type, page):
        if page_type in range(1, 5) or page_type in range(9, 13):
            return b"\x80" + page
        old = self.pages.pop(pfn, None)
        self.pages[pfn] = page
        if old is None:
            if len(self.pages) > 8192:
                del self.pages[next(iter(self.pages))]
            return b"\x80" + page
        if old == page:
            return b"\0"
        out, word = bytearray(), 0
        while word < 1024:
            same = old[word * 4:word * 4 + 4] == page[word * 4:word * 4 + 4]
            run = 1
            while (run < 127 and word + run < 1024
                   and (old[(word + run) * 4:(word + run) * 4 + 4]
                        == page[(word + run) * 4:(word + run) * 4 + 4]) == same):
                run += 1
            out.append(run | (0x80 if same else 0))
            if not same:
                out += page[word * 4:(word + run) * 4]
            word += run
        return bytes(out)

    def forget(self, pfn):
        self.pages.pop(pfn, None)


class Writer:
    """Writes a guest as a legacy stream."""

    def __init__(self, out, guest, args):
        self.out, self.guest, self.args = out, guest, args
        self.rng = random.Random(f"writer/{args.seed}")
        self.cache = Cache()

    def put(self, layout, *values):
        self.out.write(struct.pack("<" + layout, *values))

    def longs(self, values):
        mask = 0xFFFFFFFF if self.args.width == 32 else (1 << 64) - 1
        values = [value & mask for value in values]
        self.put(f"{len(values)}{'I' if self.args.width == 32 else 'Q'}", *values)

    def stream(self):
        guest, args = self.guest, self.args
        if args.xl:
            config = args.xl.encode() + b"\0"
            flags = 1 if args.xl.lstrip().startswith("{") else 0
            if not flags:
                config = config[:-1]
            self.out.write(b"Xen saved domain, xl format\n \0 \r")
            self.put("IIIII", 0x01020304, flags, 0, len(config) + 4, len(config))
            self.out.write(config)
        self.longs([guest.p2m_size])
        if not guest.hvm:
            if not args.no_extended_info:
                self.extended_info()
            self.longs(guest.p2m_frames)
        if args.tmem:
            self.tmem()
        for number in range(args.checkpoints):
            last = number == args.checkpoints - 1
            self.body(number, last)
            self.tail(last)
            self.change()
        if args.cut_checkpoint:
            # The sender died in the middle of another one.
            before = dict(self.guest.pages)
            self.change()
            self.batches(self.dirty, args.compress)
            self.guest.pages = before

    def extended_info(self):
        basic = 0xAF0 if self.guest.width == 4 else 0x1430
        xsave = len(next(iter(self.guest.vcpus.values()))[2])
        blocks = [(b"vcpu", bytes(basic)), (b"extv", b"")]
        if xsave:
            blocks.append((b"xcnt", struct.pack("<I", xsave + 16)))
        if self.args.shuffle:
            self.rng.shuffle(blocks)
        if self.args.unknown_block:
            blocks.insert(1, (b"what", b"ever"))
        self.longs([(1 << 64) - 1])
        self.put("I", sum(8 + len(data) for _, data in blocks))
        for name, data in blocks:
            self.put("4sI", name, len(data))
            self.out.write(data)

    def tmem(self):
        self.put("iIIIIIII", TMEM, 1, 16, 0xFFFFFFFF, 0, 1, 2, 0xFFFFFFFF)
        for pool, pages in ((0, 2), (3, 0), (7, 5)):
            self.put("IIIQQ", pool, 1, pages, 11, 22)
            for page in range(pages):
                if pool == 7 and page == 3:
                    self.put("QQQ", *[(1 << 64) - 1] * 3)
                    break
                self.put("QQQI", pool, page, 3, page)
                self.out.write(self.rng.randbytes(PAGE))
        self.put("I", 0xFFFFFFFF)

    def change(self):
        """The guest works on, between two checkpoints."""
        self.dirty = sorted(self.rng.sample(sorted(self.guest.pages),
                                            min(len(self.guest.pages), 200)))
        for pfn in self.dirty:
            page_type, page = self.guest.pages[pfn]
            chance = self.rng.random()
            if page is None or chance < 0.05:
                page_type, page = 0, self.rng.randbytes(PAGE)
            elif chance < 0.15:
                pass
            elif chance < 0.2:
                page_type, page = XTAB, None
            else:
                page = bytearray(page)
                for _ in range(self.rng.randrange(1, 12)):
                    at = self.rng.randrange(PAGE - 64)
                    page[at:at + self.rng.randrange(1, 64)] = self.rng.randbytes(1)
                    page = page[:PAGE].ljust(PAGE, b"\x55")
                page = bytes(page)
            self.guest.pages[pfn] = (page_type, page)

    def batches(self, pfns, compressed=False):
        if self.args.no_pages:
            return
        pfns = list(pfns)
        pending = bytearray()
        for start in range(0, len(pfns), self.args.batch):
            batch = pfns[start:start + self.args.batch]
            entries = [self.guest.pages[pfn][0] << 28 | pfn for pfn in batch]
            for _ in range(self.args.filler if len(entries) < BATCH - self.args.filler else 0):
                entries.insert(self.rng.randrange(len(entries) + 1), FILLER)
            self.put("i", len(entries))
            self.longs(entries)
            for pfn in batch:
                page_type, page = self.guest.pages[pfn]
                if page is None:
                    continue
                if not compressed:
                    self.out.write(page)
                    continue
                if page_type:
                    self.cache.forget(pfn)
                pending += self.cache.compress(pfn, page_type, page)
            if compressed and self.rng.random() < 0.7:
                # What has been compressed so far, with a page cut in two.
                cut = self.rng.randrange(len(pending) + 1)
                self.compressed(pending[:cut])
                del pending[:cut]
        if pending:
            self.compressed(pending)

    def compressed(self, bytes):
        if bytes:
            self.put("i", COMPRESSED)
            self.longs([len(bytes)])
            self.out.write(bytes)

    def body(self, number, last):
        guest, args = self.guest, self.args
        if number == 0:
            self.batches(sorted(guest.pages))
            if args.live:
                self.change()
                self.batches(self.dirty)
        else:
            self.batches(self.dirty, args.compress)
        self.put("iIQII", TSC_INFO, guest.tsc[0], guest.tsc[2], guest.tsc[1], guest.tsc[3])
        if args.tmem:
            self.put("iIQQQII", TMEM_EXTRA, 7, 1, 2, 3, 4, 0xFFFFFFFF)
        if args.filler_batch:
            self.put("i", 3)
            self.longs([FILLER] * 3)
        if args.verify:
            self.put("i", VERIFY)
            self.batches(sorted(guest.pages))
        if not args.no_vcpu_info:
            top = max(guest.vcpus, default=0)
            words = [0] * (top // 64 + 1)
            for vcpu in guest.vcpus or [0]:
                words[vcpu // 64] |= 1 << vcpu % 64
            self.put(f"ii{len(words)}Q", VCPU_INFO, top, *words)
        if guest.hvm:
            for index, chunk in PARAM_CHUNKS.items():
                if guest.params.get(index):
                    self.put("iIQ", chunk, 0, guest.params[index])
        if args.toolstack:
            record = struct.pack("<II", 1, len(guest.physmap))
            for phys, start, size, name in guest.physmap:
                name = name.encode() + b"\0"
                record += struct.pack("<QQQI", phys, start, size, len(name)) + name
                if args.width == 64:
                    record += b"\xaa" * 4
            self.put("iI", TOOLSTACK, len(record))
            self.out.write(record)
        if last and not args.no_last_checkpoint and not args.cut_checkpoint:
            self.put("i", LAST_CHECKPOINT)
        if args.compress and number == 0:
            self.put("i", COMPRESS)
        self.put("i", 0)

    def tail(self, last):
        guest = self.guest
        if guest.hvm:
            self.put("QQQI", *(guest.params.get(index, 0) for index in MAGIC), len(guest.context))
            self.out.write(guest.context)
            if self.args.qemu != "none":
                self.out.write(QEMU[self.args.qemu])
                if self.args.qemu != "old":
                    self.put("I", len(guest.qemu))
                self.out.write(guest.qemu)
            return
        holes = [pfn for pfn in range(guest.p2m_size) if pfn not in guest.pages]
        self.put("I", len(holes))
        self.longs(holes)
        for _, (basic, extended, xsave) in sorted(guest.vcpus.items()):
            self.out.write(basic)
            if not self.args.no_extended_info:
                self.out.write(extended)
                if xsave:
                    self.put("QQ", 7, len(xsave))
                    self.out.write(xsave)
        self.out.write(guest.shared_info)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--kind", choices=["pv64", "pv32", "hvm"])
    what.add_argument("--from", dest="source", metavar="IMAGE")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pages", type=int, default=300)
    parser.add_argument("--vcpus", type=int, default=2)
    parser.add_argument("--width", type=int, choices=[32, 64], default=64,
                        help="of the toolstack")
    parser.add_argument("--xsave", type=int, default=0, help="bytes of each XSAVE area")
    parser.add_argument("--batch", type=int, default=BATCH, help="pages in a batch")
    parser.add_argument("--no-pages", action="store_true", help="no batch at all")
    parser.add_argument("--filler", type=int, default=0, help="meaningless entries in each batch")
    parser.add_argument("--filler-batch", action="store_true", help="a batch of nothing else")
    parser.add_argument("--live", action="store_true", help="some pages come twice")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--shuffle", action="store_true", help="extended info in any order")
    parser.add_argument("--unknown-block", action="store_true")
    parser.add_argument("--no-extended-info", action="store_true")
    parser.add_argument("--no-vcpu-info", action="store_true")
    parser.add_argument("--tmem", action="store_true")
    parser.add_argument("--toolstack", action="store_true")
    parser.add_argument("--qemu", choices=[*QEMU, "none"], default="0002")
    parser.add_argument("--checkpoints", type=int, default=1)
    parser.add_argument("--compress", action="store_true", help="all checkpoints but the first")
    parser.add_argument("--cut-checkpoint", action="store_true",
                        help="half a checkpoint behind the last")
    parser.add_argument("--no-last-checkpoint", action="store_true")
    parser.add_argument("--xl", metavar="CONFIG", help="an xl header with this configuration")
    parser.add_argument("--expect", metavar="FILE")
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    if args.source:
        guest = from_image(args.source)
    else:
        guest = seeded(args.kind, args.seed, args.pages, args.vcpus, args.xsave)
    with sys.stdout.buffer if args.output == "-" else open(args.output, "wb") as out:
        writer = Writer(out, guest, args)
        final = {}

        # The memory that counts is that of the last checkpoint that is complete.
        tail = writer.tail
        def tail_and_note(last):
            tail(last)
            final.clear()
            final.update(guest.pages)
        writer.tail = tail_and_note
        writer.stream()
    if args.expect:
        pages = {pfn: [page_type] + ([zlib.crc32(page)] if page is not None else [])
                 for pfn, (page_type, page) in sorted(final.items())}
        with open(args.expect, "w") as out:
            json.dump({"pages": pages, "vcpus": sorted(guest.vcpus)}, out)


if __name__ == "__main__":
    main()
