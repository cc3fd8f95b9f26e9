//! The HVM context: the list of records that holds Xen's state of a translated guest. Generated for
//! a new guest, and validated as Xen does when it is set.
//!
//! | bytes | record |
//! |---|---|
//! | 2 | type |
//! | 2 | instance: the vcpu, for records of a vcpu |
//! | 4 | length of the body |
//!
//! C implementation: `xen/arch/x86/hvm/save.c`; the bodies are laid out in
//! `xen/include/public/arch-x86/hvm/save.h`.

use crate::Errno;

use super::layout::{read_word, write_word};
use super::platform::HOST_KHZ;
use super::random::SplitMix64;
use crate::GuestKind;

const END: u16 = 0;
const HEADER: u16 = 1;
const CPU: u16 = 2;
const XSAVE: u16 = 16;

const DESCRIPTOR: usize = 8;
const MAGIC: u64 = 0x5438_1286;
const VERSION: u64 = 1;

/// For each type that Xen knows, the bytes of its body (0 if the length varies) and whether there
/// is one for each vcpu.
const KINDS: [(u16, usize, bool); 19] = [
    (HEADER, 24, false),
    (CPU, 1032, true),
    (3, 8, false),     // PIC, two
    (4, 400, false),   // IOAPIC
    (5, 24, true),     // LAPIC
    (6, 1024, true),   // LAPIC registers
    (7, 16, false),    // PCI interrupts
    (8, 8, false),     // ISA interrupts
    (9, 8, false),     // PCI links
    (10, 56, false),   // PIT
    (11, 24, false),   // RTC
    (12, 1048, false), // HPET
    (13, 8, false),    // PM timer
    (14, 240, true),   // MTRR
    (15, 32, false),   // Viridian, domain
    (XSAVE, 0, true),
    (17, 0, true),  // Viridian, vcpu
    (18, 32, true), // machine checks
    (19, 8, true),  // TSC adjust
];
/// MSRs, of variable length, for each vcpu.
const MSRS: u16 = 20;

/// Other lengths that some versions of Xen write.
const COMPAT: [(u16, usize); 3] = [(CPU, 1016), (5, 16), (5, 32)];

fn put(out: &mut Vec<u8>, kind: u16, instance: u16, body: &[u8]) {
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&instance.to_le_bytes());
    out.extend_from_slice(&u32::try_from(body.len()).unwrap_or(0).to_le_bytes());
    out.extend_from_slice(body);
}

/// The context of a guest whose vcpus below `online` are online.
pub(super) fn make(kind: GuestKind, online: u16, seed: u64) -> Vec<u8> {
    let mut out = Vec::new();
    let mut header = [0; 24];
    write_word(&mut header, 0, 4, MAGIC);
    write_word(&mut header, 4, 4, VERSION);
    write_word(&mut header, 8, 8, u64::MAX);
    write_word(&mut header, 16, 4, 0x0083_0f10);
    write_word(&mut header, 20, 4, u64::from(HOST_KHZ));
    put(&mut out, HEADER, 0, &header);
    let mut random = SplitMix64::new(seed);
    for vcpu in 0..online {
        put(&mut out, CPU, vcpu, &cpu(&mut random));
    }
    let hvm = kind == GuestKind::Hvm;
    if hvm {
        put(&mut out, 3, 0, &[0, 0xb8, 0, 0x08, 0, 0x40, 0x24, 0]);
        put(&mut out, 3, 1, &[0, 0x8e, 0, 0x70, 0, 0, 0x0c, 0]);
        put(&mut out, 4, 0, &ioapic());
    }
    for vcpu in 0..online {
        let mut lapic = [0; 24];
        // The base address of its registers, enabled; on the first vcpu also the bootstrap
        // processor flag.
        let base = 0xfee0_0000 | 1 << 11 | if vcpu == 0 { 1 << 8 } else { 0 };
        write_word(&mut lapic, 0, 8, base);
        write_word(&mut lapic, 12, 4, 2);
        put(&mut out, 5, vcpu, &lapic);
    }
    for vcpu in 0..online {
        let mut registers = [0; 1024];
        write_word(&mut registers, 0x20, 4, u64::from(vcpu) << 25);
        write_word(&mut registers, 0x30, 4, 0x0005_0014);
        write_word(&mut registers, 0xe0, 4, 0xffff_ffff);
        write_word(&mut registers, 0xf0, 4, 0x1ff);
        put(&mut out, 6, vcpu, &registers);
    }
    put(&mut out, 7, 0, &[0; 16]);
    put(&mut out, 8, 0, &[u8::from(hvm), 0, 0, 0, 0, 0, 0, 0]);
    put(&mut out, 9, 0, &[5, 10, 11, 5, 0, 0, 0, 0]);
    if hvm {
        put(&mut out, 10, 0, &pit());
        put(&mut out, 11, 0, &rtc());
        put(&mut out, 12, 0, &hpet());
        let ticks = random.next() & 0xff_ffff;
        let mut timer = [0; 8];
        write_word(&mut timer, 0, 4, ticks);
        put(&mut out, 13, 0, &timer);
    }
    for vcpu in 0..online {
        let mut mtrr = [0; 240];
        write_word(&mut mtrr, 0, 8, 0x0007_0406_0007_0406);
        // Eight variable ranges; fixed ranges; write-back by default, enabled.
        write_word(&mut mtrr, 224, 8, 0x508);
        write_word(&mut mtrr, 232, 8, 0xc06);
        put(&mut out, 14, vcpu, &mtrr);
    }
    for vcpu in 0..online {
        put(&mut out, XSAVE, vcpu, &xsave());
    }
    for vcpu in 0..online {
        let mut checks = [0; 32];
        checks[0] = 2;
        put(&mut out, 18, vcpu, &checks);
    }
    for vcpu in 0..online {
        put(&mut out, 19, vcpu, &[0; 8]);
    }
    put(&mut out, END, 0, &[]);
    out
}

/// `hvm_hw_cpu` of an idle vcpu in 64-bit mode.
fn cpu(random: &mut SplitMix64) -> [u8; 1032] {
    let mut body = [0; 1032];
    let mut set = |offset: usize, bytes: usize, value: u64| {
        write_word(&mut body, offset, bytes, value);
    };
    set(0, 2, 0x37f);
    set(24, 4, 0x1f80);
    set(28, 4, 0xffff);
    // Sixteen registers, then rip and rflags.
    for register in 0..16 {
        set(512 + register * 8, 8, random.next());
    }
    set(512 + 7 * 8, 8, 0xffff_8880_0010_3f80);
    set(640, 8, 0xffff_ffff_8100_0000 | random.next() & 0xf_ffff);
    set(648, 8, 0x246);
    // cr0, cr2, cr3, cr4; dr0-3, dr6, dr7.
    set(656, 8, 0x8005_003b);
    set(672, 8, 0x20_a000);
    set(680, 8, 0x6a0);
    set(720, 8, 0xffff_0ff0);
    set(728, 8, 0x400);
    // Selectors cs, ds, es, fs, gs, ss, tr, ldtr; limits, with idtr and gdtr.
    for (n, selector) in [0x10, 0, 0, 0, 0, 0x18, 0x40, 0].into_iter().enumerate() {
        set(736 + n * 4, 4, selector);
    }
    for (n, limit) in [u64::from(u32::MAX); 6]
        .into_iter()
        .chain([0x206f, 0, 0xfff, 0x7f])
        .enumerate()
    {
        set(768 + n * 4, 4, limit);
    }
    // Bases of the same, from 808 on: tr is the seventh, and idtr and gdtr are the last.
    set(808 + 6 * 8, 8, 0xffff_fe00_0000_3000);
    set(808 + 8 * 8, 8, 0xffff_fe00_0000_0000);
    set(808 + 9 * 8, 8, 0xffff_fe00_0000_1000);
    for (n, bits) in [0xa9b, 0xc93, 0xc93, 0xc93, 0xc93, 0xc93, 0x8b, 0x82]
        .into_iter()
        .enumerate()
    {
        set(888 + n * 4, 4, bits);
    }
    // lstar, star, syscall mask and efer: long mode, syscall, no-execute.
    set(960, 8, 0xffff_ffff_8180_0080);
    set(968, 8, 0x0023_0010_0000_0000);
    set(984, 8, 0x4_7700);
    set(992, 8, 0xd01);
    set(1008, 8, random.next() >> 20);
    // The FPU registers are valid.
    set(1024, 4, 1);
    body
}

fn ioapic() -> [u8; 400] {
    const MASKED: u64 = 1 << 16;
    let mut body = [0; 400];
    write_word(&mut body, 0, 8, 0xfec0_0000);
    write_word(&mut body, 12, 4, 1);
    for pin in 0..48 {
        write_word(&mut body, 16 + pin * 8, 8, MASKED);
    }
    body
}

fn pit() -> [u8; 56] {
    let mut body = [0; 56];
    for channel in 0..3 {
        let at = channel * 16;
        write_word(&mut body, at, 4, 0x1_0000);
        // Low then high byte; mode 3; the speaker's gate is closed.
        body[at + 12] = 3;
        body[at + 13] = 3;
        body[at + 15] = u8::from(channel != 2);
    }
    body
}

fn rtc() -> [u8; 24] {
    let mut body = [0; 24];
    // Noon on a Sunday, in binary-coded decimal.
    body[..14].copy_from_slice(&[
        0, 0, 0, 0, 0x12, 0, 0x01, 0x01, 0x01, 0x23, 0x26, 0x02, 0, 0x80,
    ]);
    body
}

fn hpet() -> [u8; 1048] {
    let mut body = [0; 1048];
    write_word(&mut body, 0, 8, 0x00f4_2400_8086_a201);
    for timer in 0..3 {
        // The interrupts that it can raise; periodic and 64 bits wide.
        write_word(&mut body, 256 + timer * 32, 8, 0x00f0_0000_0000_8030);
        write_word(&mut body, 264 + timer * 32, 8, u64::MAX);
    }
    body
}

/// `hvm_hw_cpu_xsave` with room for x87, SSE, AVX and PKRU.
fn xsave() -> [u8; 2720] {
    let mut body = [0; 2720];
    write_word(&mut body, 0, 8, 0x207);
    write_word(&mut body, 8, 8, 0x7);
    write_word(&mut body, 16, 8, 0x207);
    write_word(&mut body, 24, 2, 0x37f);
    write_word(&mut body, 48, 4, 0x1f80);
    write_word(&mut body, 52, 4, 0xffff);
    write_word(&mut body, 24 + 512, 8, 0x3);
    body
}

/// Whether Xen would accept `context` for a guest of `vcpus` vcpus. Returns its end (after the end
/// marker), and the vcpus that it brings online.
pub(super) fn check(context: &[u8], vcpus: usize) -> Result<(usize, Vec<bool>), Errno> {
    let mut online = vec![false; vcpus];
    let mut at = 0;
    loop {
        let descriptor = context.get(at..at + DESCRIPTOR).ok_or(Errno::EINVAL)?;
        let kind = u16::from_le_bytes([descriptor[0], descriptor[1]]);
        let instance = usize::from(u16::from_le_bytes([descriptor[2], descriptor[3]]));
        let len = usize::try_from(read_word(descriptor, 4, 4)).map_err(|_| Errno::EINVAL)?;
        // The header comes first, and only there.
        if (at == 0) != (kind == HEADER) {
            return Err(Errno::EINVAL);
        }
        at += DESCRIPTOR;
        if kind == END {
            return Ok((at, online));
        }
        let end = at.checked_add(len).ok_or(Errno::EINVAL)?;
        let body = context.get(at..end).ok_or(Errno::EINVAL)?;
        at = end;
        check_record(kind, instance, body, vcpus)?;
        if kind == CPU {
            online[instance] = true;
        }
    }
}

fn check_record(kind: u16, instance: usize, body: &[u8], vcpus: usize) -> Result<(), Errno> {
    let known = KINDS.iter().copied().chain([(MSRS, 0, true)]);
    let (_, len, per_vcpu) = known
        .into_iter()
        .find(|(known, ..)| *known == kind)
        .ok_or(Errno::EINVAL)?;
    let fits = len == 0 || body.len() == len || COMPAT.contains(&(kind, body.len()));
    if !fits || (per_vcpu && instance >= vcpus) {
        return Err(Errno::EINVAL);
    }
    if kind == HEADER && (read_word(body, 0, 4) != MAGIC || read_word(body, 4, 4) != VERSION) {
        return Err(Errno::EINVAL);
    }
    // Three words and the smallest possible area.
    if kind == XSAVE && body.len() < 24 + 512 + 64 {
        return Err(Errno::EINVAL);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_made_context_is_taken() {
        for (kind, online) in [(GuestKind::Hvm, 3), (GuestKind::Pvh, 1)] {
            let context = make(kind, online, 7);
            let (end, up) = check(&context, 4).expect("good");
            assert_eq!(end, context.len());
            assert_eq!(up.iter().filter(|up| **up).count(), usize::from(online));
        }
    }

    #[test]
    fn a_context_cut_anywhere_is_refused() {
        let context = make(GuestKind::Hvm, 2, 7);
        for len in 0..context.len() {
            assert_eq!(check(&context[..len], 2), Err(Errno::EINVAL), "at {len}");
        }
    }

    #[test]
    fn wrong_magic_unknown_type_and_absent_vcpu_are_refused() {
        let good = make(GuestKind::Pvh, 2, 7);
        assert_eq!(check(&good, 1), Err(Errno::EINVAL));
        let mut magic = good.clone();
        magic[DESCRIPTOR] ^= 1;
        assert_eq!(check(&magic, 2), Err(Errno::EINVAL));
        let mut kind = good;
        // The record after the header.
        kind[DESCRIPTOR + 24] = 21;
        assert_eq!(check(&kind, 2), Err(Errno::EINVAL));
    }
}
