//! The documents that are made by the program are as it would make them now.

use std::path::Path;

#[test]
fn the_command_reference_is_that_of_the_command_line() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/commands.md");
    let made = proxyset::cli::reference();
    if std::env::var_os("PROXYSET_WRITE_DOCUMENTS").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == made, "docs/commands.md is stale: `make commands` writes it again");
}
