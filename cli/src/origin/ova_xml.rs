//! `ova.xml` of an XVA: which disk holds the memory of the VM.
//!
//! It is XML-RPC: a struct with an array `objects`, each of which is a struct of `class`, `id` and
//! `snapshot` (a struct of the object's fields).
//!
//! Implementation: `ocaml/xapi/{export,importexport}.ml` of xen-api.

use super::xml::{Piece, Pieces, plain};

/// How deep elements may be nested. xapi's are nested less than 30 deep.
const MAX_DEPTH: usize = 64;
/// The longest value that is kept.
const MAX_VALUE: usize = 256;
/// The most VMs, snapshots included. xapi keeps 30 snapshots of a VM unless it is told otherwise.
const MAX_VMS: usize = 1024;

/// The disk with the memory of a suspended VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SuspendDisk {
    /// The name of the VM, and its UUID, for the user.
    pub(crate) vm: String,
    /// The directory of the disk's blocks in the archive.
    pub(crate) directory: String,
}

/// A VM, or a snapshot of one, while it is read.
#[derive(Default)]
struct Vm {
    class: String,
    name: String,
    uuid: String,
    suspend_vdi: String,
    is_snapshot: bool,
}

impl SuspendDisk {
    /// The disk with the memory of the VM in this text. A snapshot with memory (a checkpoint) counts
    /// if the VM itself has none.
    ///
    /// # Errors
    ///
    /// The text is malformed; there is no memory, or there are several checkpoints.
    pub(crate) fn in_ova_xml(text: &str) -> Result<Self, String> {
        let vms = vms(text).map_err(|why| format!("ova.xml in the XVA archive {why}"))?;
        let has_memory = |vm: &&Vm| vm.suspend_vdi.starts_with("Ref:");
        let (snapshots, own): (Vec<&Vm>, Vec<&Vm>) =
            vms.iter().filter(has_memory).partition(|vm| vm.is_snapshot);
        let candidates = if own.is_empty() { snapshots } else { own };
        match candidates[..] {
            [vm] => Ok(Self {
                vm: vm.words(),
                directory: vm.suspend_vdi.clone(),
            }),
            [] => {
                let names: Vec<String> = vms.iter().take(4).map(Vm::words).collect();
                Err(format!(
                    "an XVA archive without memory: it holds {}, which was not suspended when it \
                     was exported (xe vm-suspend; xe vm-export preserve-power-state=true)",
                    match names[..] {
                        [] => "no VM".to_owned(),
                        _ => names.join(", "),
                    }
                ))
            }
            _ => {
                let names: Vec<String> = candidates.iter().take(8).map(|vm| vm.words()).collect();
                Err(format!(
                    "an XVA archive with the memory of {} VMs: {}; export one alone",
                    candidates.len(),
                    names.join(", ")
                ))
            }
        }
    }
}

impl Vm {
    fn words(&self) -> String {
        format!("{:?} ({})", self.name, self.uuid.escape_debug())
    }

    /// Takes a field of the VM's record.
    fn field(&mut self, name: &str, value: &str) {
        let field = match name {
            "name_label" => &mut self.name,
            "uuid" => &mut self.uuid,
            "suspend_VDI" => &mut self.suspend_vdi,
            "is_a_snapshot" => {
                self.is_snapshot = matches!(value, "1" | "true");
                return;
            }
            _ => return,
        };
        *field = value.chars().take(MAX_VALUE).collect();
    }
}

/// The VMs and their snapshots.
fn vms(text: &str) -> Result<Vec<Vm>, String> {
    /// Depth of structs: the document's, an object's, its record's.
    const OBJECT: usize = 2;
    const RECORD: usize = 3;
    let mut pieces = Pieces::new(text);
    let mut path: Vec<&str> = Vec::new();
    // The name of the current member of each struct that is open.
    let mut members: Vec<String> = Vec::new();
    let mut vms: Vec<Vm> = Vec::new();
    let mut vm = Vm::default();
    let mut words = String::new();
    while let Some(piece) = pieces.next()? {
        match piece {
            Piece::Start { name, empty, .. } => {
                words.clear();
                if empty {
                    continue;
                }
                if path.len() >= MAX_DEPTH {
                    return Err(format!("is nested more than {MAX_DEPTH} deep"));
                }
                path.push(name);
                if name == "struct" {
                    members.push(String::new());
                    if members.len() == OBJECT {
                        vm = Vm::default();
                    }
                }
            }
            // Only short values are of interest.
            Piece::Text(text) if words.len() <= 4 * MAX_VALUE => words.push_str(text),
            Piece::Text(_) => {}
            Piece::End => {
                let Some(element) = path.pop() else {
                    return Err("ends an element that was not begun".to_owned());
                };
                let value = plain(words.trim());
                words.clear();
                let depth = members.len();
                let outer = members.first().map_or("", String::as_str);
                match element {
                    "name" => {
                        if let Some(member) = members.last_mut() {
                            *member = value;
                        }
                    }
                    "struct" => {
                        if depth == OBJECT && outer == "objects" && vm.class == "VM" {
                            if vms.len() >= MAX_VMS {
                                return Err(format!("has more than {MAX_VMS} VMs"));
                            }
                            vms.push(std::mem::take(&mut vm));
                        }
                        members.pop();
                    }
                    _ if value.is_empty() => {}
                    _ => match (depth, members.last().map(String::as_str)) {
                        (OBJECT, Some("class")) => vm.class = value,
                        (RECORD, Some(name)) => vm.field(name, &value),
                        _ => {}
                    },
                }
            }
        }
    }
    match path.last() {
        None if text.trim().is_empty() => Err("is empty".to_owned()),
        None => Ok(vms),
        Some(open) => Err(format!("ends inside <{}>", open.escape_debug())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An object as xapi writes it.
    fn object(class: &str, id: &str, fields: &[(&str, &str)]) -> String {
        let fields: String = (fields.iter())
            .map(|(name, value)| {
                let value = match *name {
                    "is_a_snapshot" => format!("<boolean>{value}</boolean>"),
                    _ => (*value).to_owned(),
                };
                format!("<member><name>{name}</name><value>{value}</value></member>")
            })
            .collect();
        format!(
            "<value><struct><member><name>class</name><value>{class}</value></member><member>\
             <name>id</name><value>{id}</value></member><member><name>snapshot</name><value>\
             <struct>{fields}<member><name>platform</name><value><struct><member>\
             <name>suspend_VDI</name><value>Ref:9</value></member></struct></value></member>\
             </struct></value></member></struct></value>"
        )
    }

    fn document(objects: &[String]) -> String {
        format!(
            "<?xml version='1.0'?><value><struct><member><name>version</name><value><struct>\
             <member><name>xapi_major</name><value>1</value></member></struct></value></member>\
             <member><name>objects</name><value><array><data>{}</data></array></value></member>\
             </struct></value>",
            objects.concat()
        )
    }

    fn vm(name: &str, disk: &str, snapshot: &str) -> String {
        let fields = [
            ("uuid", "u-1"),
            ("name_label", name),
            ("is_a_snapshot", snapshot),
            ("suspend_VDI", disk),
        ];
        object("VM", "Ref:0", &fields)
    }

    #[test]
    fn the_memory_is_that_of_the_vm_itself_and_else_of_its_only_checkpoint() {
        let null = "OpaqueRef:NULL";
        let disk = object("VDI", "Ref:5", &[("suspend_VDI", "Ref:7")]);
        for (objects, expected) in [
            (vec![disk.clone(), vm("a &amp; b", "Ref:5", "0")], "Ref:5"),
            (
                vec![vm("a &amp; b", "Ref:5", "0"), vm("s", "Ref:6", "1")],
                "Ref:5",
            ),
            (
                vec![vm("t", null, "0"), vm("a &amp; b", "Ref:6", "1")],
                "Ref:6",
            ),
        ] {
            let found = SuspendDisk::in_ova_xml(&document(&objects)).expect("one has memory");
            assert_eq!(found.directory, expected);
            assert_eq!(found.vm, "\"a & b\" (u-1)");
        }
        for (objects, expected) in [
            (vec![disk], "it holds no VM"),
            (
                vec![vm("web", null, "0")],
                "\"web\" (u-1), which was not suspended",
            ),
            (
                vec![
                    vm("web", null, "0"),
                    vm("s", "Ref:5", "1"),
                    vm("t", "Ref:6", "1"),
                ],
                "memory of 2 VMs: \"s\" (u-1), \"t\" (u-1)",
            ),
        ] {
            let error = SuspendDisk::in_ova_xml(&document(&objects)).expect_err("no memory");
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_document_that_is_cut_off_or_deep_is_refused() {
        let text = document(&[vm("a", "Ref:5", "0")]);
        for end in 0..text.len() {
            // Within the last tag, the document's own value is still open.
            assert!(SuspendDisk::in_ova_xml(&text[..end]).is_err(), "{end}");
        }
        let deep = "<value><struct>".repeat(1000);
        let error = SuspendDisk::in_ova_xml(&deep).expect_err("deep");
        assert!(error.contains("nested more than 64 deep"), "{error}");
        assert!(SuspendDisk::in_ova_xml("</value>").is_err());
    }

    #[test]
    fn long_values_are_cut() {
        let long = "x".repeat(1 << 20);
        let found = SuspendDisk::in_ova_xml(&document(&[vm(&long, "Ref:5", "0")]));
        assert!(found.expect("one has memory").vm.len() < 300);
    }
}
