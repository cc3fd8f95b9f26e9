//! `cargo xtask semver`: compares the public items of the libraries with a committed list of them,
//! one text file for each crate.
//!
//! The list is made from the source with `syn`, so it needs neither a nightly compiler nor a build.
//! It has one line for each public item: functions with their signatures, public fields, variants,
//! and implementations of traits. An item of a private module counts if some `pub use` names it.
//! What it does not see: the effect of a type's fields on auto traits (`Send`), and items that a
//! macro produces.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use quote::ToTokens;
use syn::{Attribute, Fields, ImplItem, Item, TraitItem, UseTree, Visibility};

use crate::command::Invocation;
use crate::workspace;

/// The directories of the library crates.
const CRATES: [&str; 3] = ["format", "xen-backend", "save-restore"];

/// Report changes of the libraries' public items
///
/// Compares the public items of xsr-format, xsr-xen-backend and xsr-save-restore with the lists in
/// xtask/surface. Lines that are gone or changed break users of the libraries. The task reports
/// them; after the first release (a tag v*), it fails.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask semver             what has changed
  cargo xtask semver --accept    make the present items the new list")]
pub(crate) struct SemverArgs {
    /// Write the lists anew
    #[arg(long)]
    pub(crate) accept: bool,
}

/// Compares, or writes, the list of each crate.
pub(crate) fn run(args: &SemverArgs) -> Result<()> {
    let mut broken = 0;
    for name in CRATES {
        let now = surface(&workspace::root().join(name).join("src"))?;
        let path = list_path(name);
        if args.accept {
            let text: String = now.iter().map(|line| format!("{line}\n")).collect();
            fs::write(&path, text).with_context(|| path.display().to_string())?;
            println!("{name}: {} public items", now.len());
            continue;
        }
        let text = fs::read_to_string(&path)
            .with_context(|| format!("{}: make it with --accept", path.display()))?;
        let before: BTreeSet<String> = text.lines().map(str::to_owned).collect();
        let gone: Vec<_> = before.difference(&now).collect();
        let new: Vec<_> = now.difference(&before).collect();
        println!("{name}: {} gone, {} new", gone.len(), new.len());
        for line in &gone {
            println!("- {line}");
        }
        for line in &new {
            println!("+ {line}");
        }
        broken += gone.len();
    }
    if broken > 0 && is_released()? {
        bail!(
            "{broken} public items are gone or changed: raise the version (0.x to 0.x+1), then \
             `cargo xtask semver --accept`"
        );
    }
    Ok(())
}

fn list_path(name: &str) -> PathBuf {
    workspace::root().join(format!("xtask/surface/{name}.txt"))
}

/// Whether a version has been released.
fn is_released() -> Result<bool> {
    let tags = Invocation::new("git")
        .args(["tag", "--list", "v*"])
        .capture()?;
    Ok(!tags.trim().is_empty())
}

/// The public items of the crate whose root is `lib.rs` in `source`.
fn surface(source: &Path) -> Result<BTreeSet<String>> {
    let mut found = Found::default();
    let root = Module {
        path: String::new(),
        public: true,
    };
    found.file(&source.join("lib.rs"), source, &root)?;
    Ok(found.lines())
}

/// A module, by its path in the crate.
#[derive(Clone, Debug)]
struct Module {
    path: String,
    /// Whether it and all modules around it are public.
    public: bool,
}

impl Module {
    fn inner(&self, name: &str, public: bool) -> Self {
        Self {
            path: self.item(name),
            public: self.public && public,
        }
    }

    fn item(&self, name: &str) -> String {
        match self.path.is_empty() {
            true => name.to_owned(),
            false => format!("{}::{name}", self.path),
        }
    }
}

/// What a crate's files have.
#[derive(Debug, Default)]
struct Found {
    /// Lines for a name, those in public modules first; whether the module is public.
    items: Vec<(bool, String, String)>,
    /// Names that a `pub use` makes public.
    exported: BTreeSet<String>,
    /// Lines of implementations, by the name of the type.
    impls: BTreeMap<String, BTreeSet<String>>,
}

impl Found {
    /// The lines of everything that is public.
    fn lines(self) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        let mut lines = BTreeSet::new();
        for (public, name, line) in self.items {
            if public || self.exported.contains(&name) {
                names.insert(name);
                lines.insert(line);
            }
        }
        for (name, more) in self.impls {
            if names.contains(&name) {
                lines.extend(more);
            }
        }
        lines
    }

    /// Reads a file. `directory` is where the files of its modules are.
    fn file(&mut self, path: &Path, directory: &Path, module: &Module) -> Result<()> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let file = syn::parse_file(&text).with_context(|| path.display().to_string())?;
        self.items(&file.items, directory, module)
    }

    fn items(&mut self, items: &[Item], directory: &Path, module: &Module) -> Result<()> {
        for item in items {
            match item {
                Item::Mod(inner) if !is_test(&inner.attrs) => {
                    let name = inner.ident.to_string();
                    let below = module.inner(&name, is_public(&inner.vis));
                    let directory = directory.join(&name);
                    match &inner.content {
                        Some((_, items)) => self.items(items, &directory, &below)?,
                        None => {
                            let path = directory.with_extension("rs");
                            self.file(&path, &directory, &below)?;
                        }
                    }
                }
                Item::Use(used) if is_public(&used.vis) => {
                    names_of(&used.tree, &mut self.exported);
                    if module.public {
                        let line = format!("use in {}: {}", module.path, text(&used.tree));
                        self.items.push((true, String::new(), line));
                    }
                }
                Item::Impl(block) if !is_test(&block.attrs) => self.implementation(block),
                other => self.item(other, module),
            }
        }
        Ok(())
    }

    fn item(&mut self, item: &Item, module: &Module) {
        let (vis, name, lines) = match item {
            Item::Fn(i) => (&i.vis, &i.sig.ident, vec![text(&i.sig)]),
            Item::Const(i) => {
                let line = format!("const {}: {}", i.ident, text(&i.ty));
                (&i.vis, &i.ident, vec![line])
            }
            Item::Static(i) => {
                let line = format!("static {}: {}", i.ident, text(&i.ty));
                (&i.vis, &i.ident, vec![line])
            }
            Item::Type(i) => {
                let line = format!("type {}{} = {}", i.ident, text(&i.generics), text(&i.ty));
                (&i.vis, &i.ident, vec![line])
            }
            Item::Struct(i) => (&i.vis, &i.ident, struct_lines(i)),
            Item::Enum(i) => (&i.vis, &i.ident, enum_lines(i)),
            Item::Trait(i) => (&i.vis, &i.ident, trait_lines(i)),
            _ => return,
        };
        if !is_public(vis) {
            return;
        }
        for line in lines {
            let line = format!("{}: {line}", module.item(&name.to_string()));
            self.items.push((module.public, name.to_string(), line));
        }
    }

    fn implementation(&mut self, block: &syn::ItemImpl) {
        let name = base_name(&block.self_ty);
        let lines = self.impls.entry(name.clone()).or_default();
        let head = text(&block.self_ty);
        if let Some((_, path, _)) = &block.trait_ {
            lines.insert(format!("impl {} for {head}", text(path)));
            return;
        }
        for item in &block.items {
            match item {
                ImplItem::Fn(f) if is_public(&f.vis) => {
                    lines.insert(format!("impl {head}: {}", text(&f.sig)));
                }
                ImplItem::Const(c) if is_public(&c.vis) => {
                    lines.insert(format!("impl {head}: const {}: {}", c.ident, text(&c.ty)));
                }
                _ => {}
            }
        }
    }
}

fn struct_lines(item: &syn::ItemStruct) -> Vec<String> {
    let mut private = false;
    let mut lines = Vec::new();
    for (number, field) in item.fields.iter().enumerate() {
        let name = field.ident.as_ref().map(ToString::to_string);
        let name = name.unwrap_or_else(|| number.to_string());
        match is_public(&field.vis) {
            true => lines.push(format!("field {name}: {}", text(&field.ty))),
            false => private = true,
        }
    }
    // Without private fields and `non_exhaustive`, users may build and take apart such a value.
    let open = match private || is_non_exhaustive(&item.attrs) {
        true => "opaque ",
        false => "",
    };
    let head = format!("{open}struct {}{}", item.ident, text(&item.generics));
    lines.push(head);
    lines.extend(derives(&item.attrs));
    lines
}

fn enum_lines(item: &syn::ItemEnum) -> Vec<String> {
    let open = match is_non_exhaustive(&item.attrs) {
        true => "non-exhaustive ",
        false => "",
    };
    let head = format!("{open}enum {}{}", item.ident, text(&item.generics));
    let variants = item.variants.iter().map(|variant| {
        let fields = match &variant.fields {
            Fields::Unit => String::new(),
            fields => fields
                .iter()
                .map(|field| match &field.ident {
                    Some(name) => format!(" {name}: {}", text(&field.ty)),
                    None => format!(" {}", text(&field.ty)),
                })
                .collect::<Vec<_>>()
                .join(","),
        };
        format!("variant {}{fields}", variant.ident)
    });
    let mut lines: Vec<String> = variants.collect();
    lines.push(head);
    lines.extend(derives(&item.attrs));
    lines
}

fn trait_lines(item: &syn::ItemTrait) -> Vec<String> {
    let bounds = text(&item.supertraits);
    let mut lines = vec![format!(
        "trait {}{}: {bounds}",
        item.ident,
        text(&item.generics)
    )];
    for item in &item.items {
        lines.extend(match item {
            TraitItem::Fn(f) => {
                let kind = match f.default {
                    Some(_) => "provided",
                    None => "required",
                };
                Some(format!("{kind} {}", text(&f.sig)))
            }
            TraitItem::Const(c) => Some(format!("const {}: {}", c.ident, text(&c.ty))),
            TraitItem::Type(t) => Some(format!("type {}: {}", t.ident, text(&t.bounds))),
            _ => None,
        });
    }
    lines
}

/// One line for each derived trait.
fn derives(attributes: &[Attribute]) -> Vec<String> {
    let mut names = Vec::new();
    for attribute in attributes {
        if attribute.path().is_ident("derive") {
            // A list that cannot be parsed does not compile either.
            let _ = attribute.parse_nested_meta(|meta| {
                names.push(format!("derive {}", text(&meta.path)));
                Ok(())
            });
        }
    }
    names
}

fn is_public(vis: &Visibility) -> bool {
    matches!(vis, Visibility::Public(_))
}

fn is_non_exhaustive(attributes: &[Attribute]) -> bool {
    attributes
        .iter()
        .any(|a| a.path().is_ident("non_exhaustive"))
}

fn is_test(attributes: &[Attribute]) -> bool {
    attributes
        .iter()
        .any(|a| a.path().is_ident("cfg") && text(&a.meta) == "cfg(test)")
}

/// The name of the type that an implementation is for.
fn base_name(ty: &syn::Type) -> String {
    match ty {
        syn::Type::Path(path) => {
            let last = path.path.segments.last();
            last.map_or_else(String::new, |segment| segment.ident.to_string())
        }
        syn::Type::Reference(reference) => base_name(&reference.elem),
        _ => String::new(),
    }
}

/// The names that a `use` makes available.
fn names_of(tree: &UseTree, names: &mut BTreeSet<String>) {
    match tree {
        UseTree::Path(path) => names_of(&path.tree, names),
        UseTree::Name(name) => drop(names.insert(name.ident.to_string())),
        UseTree::Rename(renamed) => drop(names.insert(renamed.ident.to_string())),
        UseTree::Group(group) => group.items.iter().for_each(|tree| names_of(tree, names)),
        UseTree::Glob(_) => {}
    }
}

/// Source text, spaced as rustfmt does, roughly.
fn text(tokens: &impl ToTokens) -> String {
    let mut text = tokens.to_token_stream().to_string();
    for (from, to) in [
        (" :: ", "::"),
        (":: ", "::"),
        (" < ", "<"),
        ("< ", "<"),
        (" >", ">"),
        (" (", "("),
        ("( ", "("),
        (" )", ")"),
        (" ,", ","),
        (" :", ":"),
        ("& ", "&"),
        (" ;", ";"),
        ("[ ", "["),
        (" ]", "]"),
    ] {
        text = text.replace(from, to);
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn lines(source: &str) -> Vec<String> {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("lib.rs"), source).unwrap();
        surface(directory.path()).unwrap().into_iter().collect()
    }

    #[test]
    fn only_public_items_are_listed() {
        let source = "
            pub mod a { pub fn f(x: &[u8]) -> Option<u8> { None } fn g() {} pub(crate) fn h() {} }
            mod b { pub struct Out(pub u8, u8); pub struct In; impl In { pub fn f(&self) {} } }
            pub use b::Out;
            impl b::Out { pub fn new() -> Self { todo!() } fn private(&self) {} }
            #[derive(Clone, Debug)] #[non_exhaustive] pub enum E { A, B { x: u8 } }
            pub trait T: Send { fn must(&self); fn may(&self) {} }
            impl T for b::Out {}
            #[cfg(test)] mod tests { pub fn test() {} }
        ";
        let expected = [
            "E: derive Clone",
            "E: derive Debug",
            "E: non-exhaustive enum E",
            "E: variant A",
            "E: variant B x: u8",
            "T: provided fn may(&self)",
            "T: required fn must(&self)",
            "T: trait T: Send",
            "a::f: fn f(x: &[u8]) -> Option<u8>",
            "b::Out: field 0: u8",
            "b::Out: opaque struct Out",
            "impl T for b::Out",
            "impl b::Out: fn new() -> Self",
            "use in : b::Out",
        ];
        assert_eq!(lines(source), expected);
    }

    #[test]
    fn a_changed_signature_is_a_line_that_is_gone() {
        let before = lines("pub fn f(x: u8) {}");
        assert_ne!(before, lines("pub fn f(x: u16) {}"));
        assert_eq!(before, lines("pub fn f(x: u8) { let _ = x; }"));
    }

    #[test]
    fn the_libraries_have_the_items_that_their_users_need() {
        let format = surface(&workspace::root().join("format/src")).unwrap();
        let has = |start: &str| format.iter().any(|line| line.starts_with(start));
        assert!(has("walk::Walk: opaque struct Walk<R>"));
        assert!(has("impl Walk<R>: fn open(source: R"));
        assert!(!format.iter().any(|line| line.contains("WireRecordHeader")));
    }
}
