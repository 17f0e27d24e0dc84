//! A shop for a test.

use anyhow::{Result, ensure};
use squall_lab::{HostState, Shop, ShopOptions, bin_dir, need_root};

/// Opens a shop, does something in it, closes it, and fails where anything is left.
pub fn in_a_shop(defect: Option<&str>, f: impl FnOnce(&mut Shop) -> Result<()>) -> Result<()> {
    need_root()?;
    let before = HostState::capture(&bin_dir())?;
    let options = ShopOptions {
        tag: "test".into(),
        binaries: bin_dir(),
        defect: defect.map(ToOwned::to_owned),
        memory: 256 << 20,
        cpus: 1.0,
    };
    let mut shop = Shop::open(&options)?;
    let result = f(&mut shop);
    drop(shop);
    result?;
    let changes = before.changes(&HostState::capture(&bin_dir())?);
    ensure!(changes.is_empty(), "{changes:?}");
    Ok(())
}
