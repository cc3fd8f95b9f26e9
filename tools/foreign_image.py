#!/usr/bin/env python3
"""Puts around a stream what toolstacks other than xl put around it, for tests.

Written from those toolstacks' sources, and from nothing in this project, so that the readers
here are not tested against their own idea of the formats:

    xend       tools/python/xen/xend/XendCheckpoint.py and sxp.py of Xen 4.4 (`xm save`)
    xenserver  ocaml/xenops/domain.ml of XenServer 6.2 (`suspend`)
    xapi       ocaml/xenopsd/lib/suspend_image.ml of xen-api
    libvirt    libxlSavefileHeader in src/libxl/libxl_conf.h of libvirt
    vhd        the VHD specification 1.0: a dynamic or fixed disk, as suspend VDIs are exported
    xva        ocaml/xapi/{export,stream_vdi}.ml of xen-api, and the XXH64 specification

    foreign_image.py xend --kind hvm --name web old.legacy -o web.chk
    foreign_image.py xenserver --qemu state guest.legacy -o suspend.img

The stream is a legacy one for xend and xenserver, a libxc stream for xapi, a libxl stream for
libvirt, and anything at all for vhd and xva.
"""

import argparse
import hashlib
import io
import struct
import sys
import tarfile

UUID = "1f2e3d4c-0000-1111-2222-333344445555"
ESCAPES = {"\a": "a", "\b": "b", "\t": "t", "\n": "n", "\v": "v", "\f": "f", "\r": "r",
           "\\": "\\", "'": "'", '"': '"'}


def sxp(value):
    """An s-expression, as xend wrote it: what is no plain atom stands in quotes."""
    if isinstance(value, list):
        return "(" + " ".join(sxp(item) for item in value) + ")"
    text = str(value)
    if text and all(c.isprintable() and c not in " {}()<>[];#\"'@!\\" for c in text):
        return text
    return "'" + "".join("\\" + ESCAPES[c] if c in ESCAPES else c for c in text) + "'"


def xend(args, stream):
    image = "hvm" if args.kind == "hvm" else "linux"
    config = ["domain", ["domid", 3], ["on_crash", "restart"], ["uuid", args.uuid],
              ["bootloader_args", ""], ["vcpus", args.vcpus], ["name", args.name],
              ["on_poweroff", "destroy"], ["on_reboot", "restart"], ["memory", args.memory],
              ["maxmem", args.memory], ["shadow_memory", 0], ["features", ""],
              ["image", [image, ["kernel", "/boot/vmlinuz"], ["args", "root=/dev/xvda1 ro"]]],
              ["status", 2],
              ["device", ["vif", ["bridge", "xenbr0"], ["mac", "00:16:3e:00:00:01"]]],
              ["device", ["vbd", ["uname", "phy:vg/disk"], ["dev", "xvda:disk"], ["mode", "w"]]]]
    text = sxp(config).encode()
    state = b"QemuDeviceModelRecord" + args.qemu if args.qemu is not None else b""
    return b"LinuxGuestRecord" + struct.pack("!i", len(text)) + text + stream + state


def xenserver(args, stream):
    out = b"XenSavedDomain\n" + stream
    if args.qemu is not None:
        # Io.write_int is big endian.
        out += b"QemuDeviceModelRecord\n" + struct.pack("!I", len(args.qemu)) + args.qemu
    return out


def quoted(text):
    """A string in an s-expression of OCaml's Sexplib."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def xapi(args, stream):
    def record(kind, body=b"", length=None):
        return struct.pack("<QQ", kind, len(body) if length is None else length) + body
    kind = "(HVM((hap true)))" if args.kind == "hvm" else "(PV((boot(Direct()))))"
    vm = (f"((id {args.uuid})(name {quoted(args.name)})(ssidref 0)(xsdata())(ty {kind})"
          f"(memory_static_max {args.memory << 20})(memory_dynamic_max {args.memory << 20})"
          f"(vcpu_max {args.vcpus})(vcpus {args.vcpus}))")
    xenops = f"((time 20200101T00:00:00Z)(word_size 64)(vm_str {quoted(vm)})(xs_subtree()))"
    out = b"XenSavedDomv2-\n" + record(0x000f, xenops.encode())
    out += record(0x00f0, length=0) + stream
    for option, kind in ((args.varstored, 0x0f11), (args.swtpm, 0x0f13), (args.qemu, 0x0f01)):
        if option is not None:
            out += record(kind, option)
    return out + record(0xffff)


def libvirt(args, stream):
    os_type = {"hvm": "hvm", "pvh": "xenpvh"}.get(args.kind, "xen")
    xml = (f"<domain type='xen'>\n  <name>{args.name}</name>\n  <uuid>{args.uuid}</uuid>\n"
           f"  <memory unit='KiB'>{args.memory << 10}</memory>\n"
           f"  <currentMemory unit='KiB'>{args.memory << 10}</currentMemory>\n"
           f"  <vcpu placement='static'>{args.vcpus}</vcpu>\n  <os>\n    <type>{os_type}</type>\n"
           "  </os>\n  <devices>\n    <disk type='file' device='disk'>\n"
           "      <source file='/images/a.img'/>\n      <target dev='xvda' bus='xen'/>\n"
           "    </disk>\n  </devices>\n</domain>\n").encode() + b"\0"
    header = struct.pack("<16sII40x", b"libvirt-xml\n \0 \r", 2, len(xml))
    return header + xml + stream


def vhd(args, stream):
    """Blocks of 2 MiB; those of zeros alone are left out."""
    block, sector = 2 << 20, 512
    blocks = (len(stream) + block - 1) // block
    size = blocks * block

    def summed(data, at):
        return data[:at] + struct.pack(">I", ~sum(data) & 0xffffffff) + data[at + 4:]

    header_at = 0xffffffffffffffff if args.fixed else 512
    footer = struct.pack(">8sIIQI4sI4sQQHBBI4x16sB427x", b"conectix", 2, 0x10000, header_at, 0,
                         b"test", 0, b"Wi2k", size, size, size // 512 // 16 // 63 & 0xffff, 16, 63,
                         2 if args.fixed else 3, bytes(range(16)), 0)
    footer = summed(footer, 64)
    if args.fixed:
        return stream.ljust(size, b"\0") + footer
    header = struct.pack(">8sQQIIII16sI4x512s192x256x", b"cxsparse", 0xffffffffffffffff, 1536,
                         0x10000, blocks, block, 0, b"", 0, b"")
    header = summed(header, 36)
    table, data = [], b""
    at = 1536 + (blocks * 4 + sector - 1) // sector * sector
    for number in range(blocks):
        part = stream[number * block:(number + 1) * block].ljust(block, b"\0")
        if not any(part):
            table.append(0xffffffff)
            continue
        table.append((at + len(data)) // sector)
        data += b"\xff" * sector + part
    bat = b"".join(struct.pack(">I", entry) for entry in table)
    bat = bat.ljust((len(bat) + sector - 1) // sector * sector, b"\xff")
    return footer + header + bat + data + footer


def xxh64(data):
    """XXH64 with seed 0."""
    p1, p2, p3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
    p4, p5, mask = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5, 0xFFFFFFFFFFFFFFFF

    def turned(word, bits):
        word &= mask
        return (word << bits | word >> 64 - bits) & mask

    def mixed(lane, word):
        return turned(lane + word * p2, 31) * p1 & mask

    at = 0
    if len(data) >= 32:
        lanes = [p1 + p2 & mask, p2, 0, -p1 & mask]
        while at + 32 <= len(data):
            words = struct.unpack_from("<4Q", data, at)
            lanes = [mixed(lane, word) for lane, word in zip(lanes, words)]
            at += 32
        out = sum(turned(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18))) & mask
        for lane in lanes:
            out = ((out ^ mixed(0, lane)) * p1 + p4) & mask
    else:
        out = p5
    out = out + len(data) & mask
    while at + 8 <= len(data):
        out = turned(out ^ mixed(0, struct.unpack_from("<Q", data, at)[0]), 27) * p1 + p4 & mask
        at += 8
    if at + 4 <= len(data):
        out = turned(out ^ struct.unpack_from("<I", data, at)[0] * p1, 23) * p2 + p3 & mask
        at += 4
    for byte in data[at:]:
        out = turned(out ^ byte * p5, 11) * p1 & mask
    for bits, prime in ((33, p2), (29, p3)):
        out = (out ^ out >> bits) * prime & mask
    return out ^ out >> 32


def ova_xml(args, disk):
    """The description of a VM and its disks, in XML-RPC."""
    def value(of):
        if isinstance(of, dict):
            return "<value><struct>" + "".join(
                f"<member><name>{name}</name>{value(item)}</member>"
                for name, item in of.items()) + "</struct></value>"
        if isinstance(of, list):
            return "<value><array><data>" + "".join(map(value, of)) + "</data></array></value>"
        if isinstance(of, bool):
            return f"<value><boolean>{of:d}</boolean></value>"
        text = str(of).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return f"<value>{text}</value>" if text else "<value/>"

    def thing(kind, ref, **fields):
        return {"class": kind, "id": ref, "snapshot": fields}
    version = {"hostname": "host", "product_brand": "XCP-ng", "xapi_major": "1",
               "xapi_minor": "20", "export_vsn": "2"}
    vm = thing("VM", "Ref:0", uuid=args.uuid, name_label=args.name, name_description="",
               power_state="Suspended", suspend_VDI=disk, is_a_template=False,
               is_a_snapshot=False, platform={"viridian": "true"}, VBDs=["Ref:1"])
    disks = [thing("VDI", ref, uuid=ref, name_label=name, virtual_size="4194304", SR="Ref:2",
                   type=kind) for ref, name, kind in (("Ref:3", "root", "user"),
                                                      ("Ref:41", "Suspend image", "suspend"))]
    objects = [thing("SR", "Ref:2", name_label="local"), *disks, vm,
               thing("VBD", "Ref:1", VM="Ref:0", VDI="Ref:3", device="xvda")]
    return ("<?xml version='1.0'?>"
            + value({"version": version, "objects": objects})).encode()


def xva(args, stream):
    """A suspended VM with a disk of its own; blocks of zeros are left out."""
    out, block = io.BytesIO(), 1 << 20
    archive = tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT)

    def member(name, data):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))

    def part(name, data):
        member(name, data)
        if args.checksums == "xxhash":
            member(name + ".xxhash", b"%016X" % xxh64(data))
        elif args.checksums == "sha1":
            member(name + ".checksum", hashlib.sha1(data).hexdigest().encode())

    def disk(ref, data):
        number, at = 0, 0
        while at < len(data):
            piece = data[at:at + block]
            ends = at == 0 or at + block >= len(data)
            if args.keep_alive and number % 2 and not ends and number < 8:
                # Not a part of the disk; it has a number all the same.
                part(f"{ref}/{number:08d}", b"")
                number += 1
            if ends or any(piece):
                part(f"{ref}/{number:08d}", piece)
            number, at = number + 1, at + block

    member("ova.xml", ova_xml(args, "OpaqueRef:NULL" if args.not_suspended else "Ref:41"))
    disk("Ref:3", b"boot" * 1000 + bytes(3 << 20) + b"data" * 77)
    # The suspend VDI is larger than its contents.
    disk("Ref:41", stream + bytes(3 << 20))
    archive.close()
    return out.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["xend", "xenserver", "xapi", "libvirt", "vhd", "xva"])
    parser.add_argument("stream")
    parser.add_argument("--kind", choices=["pv", "hvm", "pvh"], default="pv")
    parser.add_argument("--name", default="old")
    parser.add_argument("--uuid", default=UUID)
    parser.add_argument("--memory", type=int, default=4, help="in MiB")
    parser.add_argument("--vcpus", type=int, default=1)
    for option in ("qemu", "varstored", "swtpm"):
        parser.add_argument(f"--{option}", type=str.encode, metavar="STATE")
    parser.add_argument("--fixed", action="store_true", help="for vhd")
    parser.add_argument("--checksums", choices=["xxhash", "sha1", "none"], default="xxhash",
                        help="for xva")
    for option in ("keep-alive", "not-suspended"):
        parser.add_argument(f"--{option}", action="store_true", help="for xva")
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    with open(args.stream, "rb") as source:
        made = globals()[args.what](args, source.read())
    with open(args.output, "wb") as out:
        out.write(made)


if __name__ == "__main__":
    sys.exit(main())
