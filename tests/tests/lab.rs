//! The lab itself: what the other tests measure with must measure right, and must leave nothing behind.

use std::time::Duration;

use anyhow::{Result, ensure};
use squall_tests::{HostState, Lab, Shop, ShopOptions, bin_dir, need_root};

#[test]
fn a_lab_answers_on_both_families_and_leaves_nothing() -> Result<()> {
    need_root()?;
    let before = HostState::capture(&bin_dir())?;
    let lab = Lab::new("lab")?;
    for address in [Lab::FAR, Lab::FAR_OTHER, Lab::FAR_V6] {
        let ping = lab.near.ping(address, 5, Duration::from_millis(20))?;
        ensure!(ping.rtts.len() == 5, "{address}: {ping:?}");
    }
    ensure!(before.changes(&HostState::capture(&bin_dir())?).len() == 2, "two namespaces are a change");
    drop(lab);
    assert_eq!(before.changes(&HostState::capture(&bin_dir())?), [""; 0]);
    Ok(())
}

#[test]
fn a_stream_is_measured() -> Result<()> {
    let lab = Lab::new("lab")?;
    for address in [Lab::FAR, Lab::FAR_V6] {
        let stream = lab.near.stream(&lab.far, address, Duration::from_secs(1))?;
        ensure!(stream.bytes > 1_000_000 && stream.bits_per_second > 1e6, "{address}: {stream:?}");
    }
    Ok(())
}

#[test]
fn a_shop_opens_and_leaves_nothing() -> Result<()> {
    need_root()?;
    let before = HostState::capture(&bin_dir())?;
    let options =
        ShopOptions { tag: "shop".into(), binaries: bin_dir(), defect: None, memory: 256 << 20, cpus: 1.0 };
    let mut shop = Shop::open(&options)?;
    let pid = shop.service().pid();
    ensure!(shop.cgroup().processes()?.contains(&pid.cast_signed()), "the service is in its cgroup");
    ensure!(shop.ask("U7")?.contains("\"user_id\":\"U7\""));
    let during = before.changes(&HostState::capture(&bin_dir())?);
    ensure!(during.iter().any(|line| line.contains("process")), "{during:?}");
    ensure!(during.iter().any(|line| line.contains("cgroup")), "{during:?}");
    drop(shop);
    assert_eq!(before.changes(&HostState::capture(&bin_dir())?), [""; 0]);
    Ok(())
}
