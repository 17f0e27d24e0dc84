//! Which addresses are worth a lookup among the CIDRs: a Bloom filter of one hash in front of their tries.
//!
//! Most packets are of peers that no rule names, and a trie of many CIDRs is deep. A CIDR is one bit here, chosen by its first bits: as many
//! of them as the longest grain has that is not longer than the CIDR. An address asks for one bit for each grain that is in use. So what a
//! CIDR covers always passes; of the rest a few do, and the trie says no.

use crate::packet::Peer;

/// Bits of a sieve: 4 of 100 are set by 10 000 CIDRs.
const BITS: usize = 1 << 18;
/// The words they are kept in.
pub const WORDS: usize = BITS / 64;
/// Grains of each family: 32, 24, 16, 8 and 0 bits of an IPv4 address; 128, 64, 48, 32 and 0 of an IPv6 address.
const GRAINS: usize = 5;
/// Where the grains of IPv6 begin among the bits that say which are in use.
const V6: usize = 8;

/// The bit of an address under a grain of its family.
#[inline(always)]
fn bit(peer: &Peer, grain: usize) -> usize {
    /// An odd number whose bits look random: the golden ratio's.
    const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
    let first = if peer.v6 == 0 {
        peer.low >> (8 * grain)
    } else {
        match grain {
            0 => peer.high.rotate_left(32).wrapping_mul(SPREAD) ^ peer.low,
            1 => peer.high,
            2 => peer.high >> 16,
            3 => peer.high >> 32,
            _ => 0,
        }
    };
    let mixed = (first ^ (grain as u64) << 56).wrapping_mul(SPREAD);
    (mixed >> (u64::BITS - BITS.ilog2())) as usize
}

/// Whether an address may be in one of the CIDRs. `grains` are those in use, and `word` gives the words of the sieve.
#[inline(always)]
#[must_use]
pub fn passes(grains: u64, peer: &Peer, word: impl Fn(usize) -> u64) -> bool {
    let grains = if peer.v6 == 0 { grains } else { grains >> V6 };
    for grain in 0..GRAINS {
        if grains >> grain & 1 != 0 {
            let bit = bit(peer, grain);
            if word(bit / 64) >> (bit % 64) & 1 != 0 {
                return true;
            }
        }
    }
    false
}

#[cfg(any(test, feature = "user"))]
mod user {
    use std::{vec, vec::Vec};

    use super::{V6, WORDS, bit};
    use crate::{packet::Peer, rules::Cidr};

    /// What a sieve is to be.
    #[derive(Debug)]
    pub struct Sieve {
        /// The grains in use.
        pub grains: u64,
        /// The words.
        pub words: Vec<u64>,
    }

    impl Sieve {
        /// The sieve for these CIDRs.
        #[must_use]
        pub fn new<'a>(cidrs: impl IntoIterator<Item = &'a Cidr>) -> Self {
            let mut sieve = Self { grains: 0, words: vec![0; WORDS] };
            for cidr in cidrs {
                let peer = Peer::from(cidr.address());
                let (family, lengths) =
                    if peer.v6 == 0 { (0, [32, 24, 16, 8, 0]) } else { (V6, [128, 64, 48, 32, 0]) };
                let grain = lengths.iter().filter(|&&length| length > cidr.prefix_len()).count();
                let bit = bit(&peer, grain);
                sieve.grains |= 1 << (family + grain);
                sieve.words[bit / 64] |= 1 << (bit % 64);
            }
            sieve
        }
    }
}

#[cfg(any(test, feature = "user"))]
pub use user::Sieve;

#[cfg(test)]
mod tests {
    use std::{net::IpAddr, vec::Vec};

    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::{packet::Address, rules::Cidr};

    fn passes(sieve: &Sieve, address: IpAddr) -> bool {
        let peer = Peer::from(match address {
            IpAddr::V4(a) => Address::V4(a.octets()),
            IpAddr::V6(a) => Address::V6(a.octets()),
        });
        super::passes(sieve.grains, &peer, |word| sieve.words[word])
    }

    fn addresses() -> impl Strategy<Value = IpAddr> {
        prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)]
    }

    proptest! {
        #[test]
        fn whatever_a_cidr_covers_passes(
            cidrs in vec((addresses(), any::<u8>()), 1..50), which in any::<prop::sample::Index>(), noise in any::<u128>(),
        ) {
            let cidr = |&(address, len): &(IpAddr, u8)| {
                Cidr::new(address, len % if address.is_ipv6() { 129 } else { 33 })
            };
            let all: Vec<Cidr> = cidrs.iter().filter_map(cidr).collect();
            let sieve = Sieve::new(&all);
            // Somewhere in one of them.
            let chosen = which.get(&all);
            let address = match chosen.address() {
                Address::V4(a) => {
                    let host = (noise as u32).checked_shr(u32::from(chosen.prefix_len())).unwrap_or(0);
                    IpAddr::from((u32::from_be_bytes(a) | host).to_be_bytes())
                }
                Address::V6(a) => {
                    let host = noise.checked_shr(u32::from(chosen.prefix_len())).unwrap_or(0);
                    IpAddr::from((u128::from_be_bytes(a) | host).to_be_bytes())
                }
            };
            prop_assert!(passes(&sieve, address), "{} of {}", address, chosen);
        }
    }

    #[test]
    fn few_others_pass() {
        // Every other network of 10 000 is named.
        let v4 = |n: u32, host: u32| IpAddr::from((0x0a00_0000 + (n << 9) + host).to_be_bytes());
        let v6 = |n: u128, host: u128| IpAddr::from(((0xfd00 << 112) + (n << 65) + host).to_be_bytes());
        let cidrs: Vec<Cidr> = (0..10_000)
            .flat_map(|n| [Cidr::new(v4(n, 0), 24), Cidr::new(v6(n.into(), 0), 64)])
            .flatten()
            .collect();
        let sieve = Sieve::new(&cidrs);
        let others = (0..10_000).flat_map(|n| [v4(n, 0x102), v6(n.into(), (1 << 64) + 2)]);
        let passed = others.filter(|other| passes(&sieve, *other)).count();
        assert!(passed < 3_000, "{passed} of 20 000, where 8 of 100 bits are set");
        // A host among its neighbours.
        let sieve = Sieve::new(&[Cidr::new(v4(7, 9), 32).unwrap()]);
        assert_eq!((0..256).filter(|host| passes(&sieve, v4(7, *host))).count(), 1);
    }
}
