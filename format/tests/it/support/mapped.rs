//! Conversion of images to the mapped layout and back.

use std::io::Read;

use xsr_format::detect::Detected;
use xsr_format::layout::MappedWriter;
use xsr_format::read::ReadOptions;
use xsr_format::transcode::{CopyError, ImageSink, Layer, transcode};
use xsr_format::walk::Walk;

/// Copies page data in pieces of arbitrary size.
fn copy<W: ImageSink>(source: &mut &[u8], bytes: u64, sink: &mut W) -> Result<u64, CopyError> {
    let most = bytes.min(70_001) as usize;
    let mut room = vec![0; most];
    let n = source.read(&mut room).map_err(CopyError::Read)?;
    sink.write_all(&room[..n]).map_err(CopyError::Write)?;
    Ok(n as u64)
}

/// Converts an image, keeping its layers.
pub(crate) fn convert<W: ImageSink>(image: &[u8], sink: &mut W) {
    let mut walk = Walk::open(image, ReadOptions::default()).unwrap();
    let to = match walk.detected() {
        Detected::Xl => Layer::Xl,
        Detected::Libxl => Layer::Libxl,
        _ => Layer::Libxc,
    };
    transcode(&mut walk, sink, to, None, copy).unwrap();
}

/// The image in the mapped layout.
pub(crate) fn mapped(image: &[u8], page_digests: bool) -> Vec<u8> {
    let mut writer = MappedWriter::new(Vec::new(), page_digests);
    convert(image, &mut writer);
    writer.finish().unwrap().0
}

/// The image in the stream layout, without what the mapped layout added.
pub(crate) fn streamed(image: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    convert(image, &mut out);
    out
}
