// A small image for the examples in the documentation, which include this file.

use xsr_format::{
    DomainHeader, GuestType, PAGE_SIZE, PageEntry, PageType, Pfn, RecordWriter, WriteError,
};

/// The context of an HVM guest without vcpus: its header, whose magic is 0x54381286, and END.
pub const CONTEXT: [u8; 40] = [
    1, 0, 0, 0, 24, 0, 0, 0, // HEADER, 24 bytes
    0x86, 0x12, 0x38, 0x54, 1, 0, 0, 0, // magic, version
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // changeset, cpuid, TSC
    0, 0, 0, 0, 0, 0, 0, 0, // END
];

/// A libxc stream with one page.
pub fn image() -> Vec<u8> {
    let write = || -> Result<Vec<u8>, WriteError> {
        let domain = DomainHeader {
            guest_type: GuestType::X86_HVM,
            xen_major: 4,
            xen_minor: 20,
        };
        let mut stream = RecordWriter::new(Vec::new(), domain)?;
        stream.static_data_end()?;
        let entry = PageEntry {
            pfn: Pfn(0x1000),
            page_type: PageType::NOTAB,
        };
        stream.page_data(&[entry], &[&[0x90; PAGE_SIZE]])?;
        stream.hvm_context(&CONTEXT)?;
        stream.end()?;
        Ok(stream.into_sink())
    };
    write().expect("the records are well-formed, and the sink is memory")
}
