//! Vcpus of a PV guest that is being built: each in the kernel of one of the processes, with FPU
//! and vector registers in use.

use super::{Build, GDT, START_INFO};
use crate::error::BackendError;
use crate::mock::layout::{VGCF_I387_VALID, VGCF_IN_KERNEL, VGCF_ONLINE, VcpuLayout, write_word};
use crate::mock::random::SplitMix64;
use crate::{PvGuest, VcpuBlob};

/// GDT entries of a vcpu.
const GDT_ENTRIES: u64 = 32;

impl Build<'_> {
    pub(super) fn set_vcpu(&self, vcpu: u32) -> Result<(), BackendError> {
        let context = self.context(vcpu);
        self.domain
            .set_vcpu_state(vcpu, VcpuBlob::Basic, &context)?;
        let mut extended = [0; 64];
        write_word(&mut extended, 0, 4, u64::from(vcpu));
        write_word(&mut extended, 4, 4, 64);
        let callback = if self.is_pae() {
            0xc100_4000
        } else {
            0xffff_ffff_8180_1000
        };
        write_word(&mut extended, 16, 8, callback);
        write_word(
            &mut extended,
            26,
            2,
            if self.is_pae() { 0xe019 } else { 0xe033 },
        );
        self.domain
            .set_vcpu_state(vcpu, VcpuBlob::Extended, &extended)?;
        let mut xsave = [0; 848];
        let mut random = SplitMix64::new(self.spec.seed ^ u64::from(vcpu));
        for word in (16..848).step_by(8) {
            write_word(&mut xsave, word, 8, random.next());
        }
        // xcr0, and its accumulated earlier values; valid FPU state; x87, SSE and AVX in use.
        write_word(&mut xsave, 0, 8, 7);
        write_word(&mut xsave, 8, 8, 7);
        write_word(&mut xsave, 16, 8, 0x37f);
        write_word(&mut xsave, 40, 8, 0xffff_0000_1f80);
        xsave[16 + 512..16 + 576].fill(0);
        xsave[16 + 512] = 7;
        self.domain.set_vcpu_state(vcpu, VcpuBlob::Xsave, &xsave)?;
        let mut msr = [0; 16];
        // TSC_AUX: a kernel stores the processor's number there.
        write_word(&mut msr, 0, 4, 0xc000_0103);
        write_word(&mut msr, 8, 8, u64::from(vcpu));
        self.domain.set_vcpu_state(vcpu, VcpuBlob::Msrs, &msr)
    }

    fn context(&self, vcpu: u32) -> Vec<u8> {
        let layout = VcpuLayout::of(self.spec.width);
        let mut random = SplitMix64::new(!self.spec.seed ^ u64::from(vcpu));
        let mut context = vec![0; layout.size];
        for bytes in context[..512].chunks_exact_mut(8).skip(20) {
            bytes.copy_from_slice(&random.next().to_le_bytes());
        }
        write_word(&mut context, 0, 4, 0x37f);
        write_word(&mut context, 24, 4, 0x1f80);
        let process = self.processes[1 + vcpu as usize % (self.processes.len() - 1)];
        let root = |pfn| layout.mfn_to_cr3(self.mfn(pfn).unwrap_or(0));
        let (text, stack, selectors) = match self.is_pae() {
            true => (0xc100_0000, 0xc1f0_0000, (0xe019, 0xe021)),
            false => (
                0xffff_ffff_8100_0000,
                0xffff_c900_4000_0000,
                (0xe033, 0xe02b),
            ),
        };
        let mut word = |offset, value| layout.set(&mut context, offset, value);
        word(layout.flags, VGCF_I387_VALID | VGCF_IN_KERNEL | VGCF_ONLINE);
        word(layout.ax, random.next() & 0xffff);
        word(
            layout.dx,
            match vcpu {
                0 => self.mfn(START_INFO).unwrap_or(0),
                _ => random.next() & 0xffff,
            },
        );
        word(layout.ip, text + 0x13aa);
        word(layout.cs, selectors.0);
        word(layout.eflags, 0x246);
        word(layout.sp, stack + u64::from(vcpu) * 0x4000);
        word(layout.ss, selectors.1);
        for vector in 0..32 {
            let trap = layout.trap_ctxt + vector * layout.trap_size;
            let address = trap + layout.trap_size - layout.width;
            word(address, text + 0x10_0000 + vector as u64 * 0x20);
        }
        word(layout.gdt_ents, GDT_ENTRIES);
        word(
            layout.gdt_frame(0),
            self.mfn(GDT + u64::from(vcpu)).unwrap_or(0),
        );
        word(layout.kernel_ss, selectors.1);
        word(layout.kernel_sp, stack + u64::from(vcpu) * 0x4000);
        word(layout.cr(0), 0x8005_0033);
        word(layout.cr(1), process.user.map_or(0, root));
        word(layout.cr(3), root(process.kernel));
        word(layout.cr(4), 0x660);
        word(layout.debugreg + 6 * layout.width, 0xffff_0ff0);
        word(layout.debugreg + 7 * layout.width, 0x400);
        // Writable page tables, architectural IOPL, run-state updates.
        word(layout.vm_assist, 0x34);
        for (n, address) in layout.addresses.iter().enumerate() {
            word(
                *address,
                if n < 3 {
                    text + 0x2000 + n as u64 * 0x40
                } else {
                    stack + n as u64
                },
            );
        }
        for vector in 0..32_u8 {
            let trap = layout.trap_ctxt + usize::from(vector) * layout.trap_size;
            context[trap] = vector;
            write_word(&mut context, trap + 2, 2, selectors.0);
        }
        context
    }
}
