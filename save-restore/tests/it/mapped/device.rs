//! A mapped image on a block device, where slots that were never written hold old data.

use super::*;

/// A writer of a block device: its length is fixed, and it is full of old data.
#[derive(Debug)]
struct Device(Box<dyn StorageWriter>);

impl Device {
    const BYTES: usize = 24 << 20;

    fn new(storage: &FakeStorage) -> Self {
        let inner = storage.create(&name(), &Create::slots()).unwrap();
        inner.write_all_at(&vec![0xff; Self::BYTES], 0).unwrap();
        Self(inner)
    }
}

impl io::Write for Device {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl StorageWriter for Device {
    fn name(&self) -> String {
        self.0.name()
    }
    fn shape(&self) -> Shape {
        self.0.shape()
    }
    fn is_straight(&self) -> bool {
        true
    }
    fn is_blank(&self) -> bool {
        false
    }
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> Result<(), StorageError> {
        self.0.write_all_at(bytes, offset)
    }
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), StorageError> {
        self.0.read_exact_at(buffer, offset)
    }
    fn punch(&self, range: std::ops::Range<u64>) -> Result<(), StorageError> {
        self.0.punch(range)
    }
    fn set_length(&self, _: u64) -> Result<(), StorageError> {
        Ok(())
    }
    fn clone_range(
        &self,
        base: &dyn StorageReader,
        range: std::ops::Range<u64>,
        to: u64,
    ) -> Result<(), StorageError> {
        self.0.clone_range(base, range, to)
    }
    fn sync(&self) -> Result<(), StorageError> {
        self.0.sync()
    }
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn commit(self: Box<Self>, durability: Durability) -> Result<(), StorageError> {
        self.0.commit(durability)
    }
}

/// A page of zeros is written there, because its slot holds something else: a page that always was
/// zeros, one that becomes zeros in a pass, and one that does in the last pass.
#[test]
fn an_image_on_a_device_full_of_old_data_is_that_in_a_new_file() {
    let some = |spec: &GuestSpec| ["pv32-linear", "pvh"].contains(&&*spec.name);
    for spec in specs().into_iter().filter(some) {
        for passes in [None, Some(1), Some(3)] {
            let save = |on_device: bool| {
                let host = host(171);
                let domid = host.create_guest(&spec).unwrap();
                let domain = host.domain(domid).unwrap();
                let mut work = host
                    .workload(domid, &WorkloadSpec::writes(7, 1, 100_000))
                    .unwrap();
                // In every second pass the guest clears what it has written before.
                let mut pass = 0;
                let mut step = |progress: &Progress| {
                    if progress.phase == Phase::Precopy && progress.pass_is_complete() {
                        work.step(100).unwrap();
                        pass += 1;
                        if pass % 2 == 1 && spec.kind.is_translated() {
                            let pfns = work.working_set();
                            let gfns: Vec<Gfn> = pfns.iter().map(|pfn| Gfn(pfn.0)).collect();
                            let pages = domain.map(&gfns, Access::Write).unwrap();
                            pages.iter().for_each(|(_, page)| page.clear());
                        }
                    }
                    ControlFlow::Continue(())
                };
                let how = How { passes, ..STILL };
                if !on_device {
                    return to_memory(&host, domid, &how, &mut step);
                }
                let storage = FakeStorage::new();
                let writer = Device::new(&storage);
                let stats = save_mapped(&host, domid, &writer, &how, &mut step).unwrap();
                Box::new(writer).commit(Durability::Process).unwrap();
                let mut bytes = read(&storage);
                assert_eq!(bytes.len(), Device::BYTES);
                bytes.truncate(usize::try_from(stats.file_bytes).unwrap());
                (bytes, stats)
            };
            let ((device, stats), (file, expected)) = (save(true), save(false));
            assert_eq!(stats, expected, "{} {passes:?}", spec.name);
            assert!(stats.zero_pages > 0, "{}", spec.name);
            let differ = device.iter().zip(&file).position(|(a, b)| a != b);
            assert_eq!(differ, None, "{} {passes:?}: {stats:?}", spec.name);
            assert_eq!(device.len(), file.len());
        }
    }
}
