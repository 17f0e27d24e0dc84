//! Interfaces, qdiscs and filters of the calling thread's network namespace, over netlink.

use std::io;

use anyhow::{Context, Result, bail};
use rtnetlink::{
    packet_core::{
        DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
        NetlinkMessage, NetlinkPayload, Nla as _, NlasIterator,
    },
    packet_route::{
        RouteNetlinkMessage,
        link::{
            AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute,
            LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
        },
        nsid::{NsidAttribute, NsidMessage},
        tc::{TcAttribute, TcHandle, TcHeader, TcMessage, TcOption, TcStats2},
    },
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

use squall_common::table::Direction;

use crate::crash;

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether it is the loopback interface.
    pub loopback: bool,
    /// What was written to it for people.
    pub alias: Option<String>,
    /// Index of the interface at the other end, in whichever network namespace that is.
    pub peer: Option<u32>,
    /// Index of the interface through which its packets go next, where it is a VLAN of that one.
    pub lower: Option<u32>,
    /// Index of the interface of which it is a part: a bond, a bridge.
    pub master: Option<u32>,
    /// Length of the header in front of the network layer; `None` for link layers we know nothing about.
    pub link_header: Option<u8>,
}

/// A qdisc.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qdisc {
    /// Its kind: `fq`, `noqueue`, …
    pub kind: String,
    /// Where it hangs.
    pub parent: TcHandle,
    /// Packets in it.
    pub packets: u32,
}

/// A filter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Its name; empty for what is no eBPF program.
    pub name: String,
    /// Id of its eBPF program.
    pub program: u32,
    /// Where it is.
    header: TcHeader,
}

/// A connection to the kernel's tables in one network namespace.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens it in the calling thread's network namespace.
    pub fn open() -> Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE).context("opening a netlink socket")?;
        socket.bind_auto().context("binding a netlink socket")?;
        socket.connect(&SocketAddr::new(0, 0)).context("connecting a netlink socket")?;
        Ok(Self { socket, sequence: 0 })
    }

    /// All interfaces.
    pub fn interfaces(&mut self) -> Result<Vec<Interface>> {
        let replies = self
            .call(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)
            .context("listing the interfaces")?;
        Ok(replies
            .into_iter()
            .filter_map(|reply| match reply {
                RouteNetlinkMessage::NewLink(link) => Some(interface(&link)),
                _ => None,
            })
            .collect())
    }

    /// Which of these processes is in the network namespace that an interface leads to, where it leads out of this one. Indexes
    /// do not tell: each namespace has its own.
    pub fn behind(&mut self, name: &str, pids: impl IntoIterator<Item = i32>) -> Result<Option<i32>> {
        let replies = self
            .call(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)
            .context("listing the interfaces")?;
        let is_it = |link: &LinkMessage| link.attributes.contains(&LinkAttribute::IfName(name.to_owned()));
        // The kernel gives the namespace an id when it names it here.
        let id = replies.iter().find_map(|reply| match reply {
            RouteNetlinkMessage::NewLink(link) if is_it(link) => {
                link.attributes.iter().find_map(|attribute| match attribute {
                    LinkAttribute::LinkNetNsId(id) => Some(*id),
                    _ => None,
                })
            }
            _ => None,
        });
        let Some(id) = id else { return Ok(None) };
        for pid in pids {
            let mut message = NsidMessage::default();
            message.attributes.push(NsidAttribute::Pid(pid.unsigned_abs()));
            // One that has ended is nobody.
            let replies = self.call(RouteNetlinkMessage::GetNsId(message), NLM_F_ACK).unwrap_or_default();
            let is_there = |reply: &RouteNetlinkMessage| matches!(reply, RouteNetlinkMessage::NewNsId(m) if m.attributes.contains(&NsidAttribute::Id(id)));
            if replies.iter().any(is_there) {
                return Ok(Some(pid));
            }
        }
        Ok(None)
    }

    /// Packets that an interface lost when they arrived or when they left, since it was made.
    pub fn lost(&mut self, index: u32, way: Direction) -> Result<u64> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        let replies = self
            .call(RouteNetlinkMessage::GetLink(link), NLM_F_ACK)
            .with_context(|| format!("asking for the counters of interface {index}"))?;
        let counted = replies.into_iter().find_map(|reply| match reply {
            RouteNetlinkMessage::NewLink(link) => link.attributes.into_iter().find_map(|a| match a {
                LinkAttribute::Stats64(stats) => Some(match way {
                    Direction::Egress => stats.tx_dropped,
                    Direction::Ingress => stats.rx_dropped,
                }),
                _ => None,
            }),
            _ => None,
        });
        counted.with_context(|| format!("interface {index} has no counters"))
    }

    /// Makes a veth pair of these names, this alias and so many queues, up, without ARP or addresses, for packets of any length.
    /// Gives the indexes.
    pub fn add_veth(&mut self, names: [&str; 2], alias: &str, queues: u32) -> Result<[u32; 2]> {
        let end = |name: &str| {
            let mut link = LinkMessage::default();
            link.attributes.push(LinkAttribute::IfName(name.to_owned()));
            link.attributes.push(LinkAttribute::Mtu(65_535));
            link.attributes.push(LinkAttribute::NumTxQueues(queues));
            link.attributes.push(LinkAttribute::NumRxQueues(queues));
            link
        };
        let mut link = end(names[0]);
        let peer = InfoData::Veth(InfoVeth::Peer(end(names[1])));
        link.attributes
            .push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth), LinkInfo::Data(peer)]));
        self.call(RouteNetlinkMessage::NewLink(link), NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)
            .with_context(|| format!("making the veth pair {} and {}", names[0], names[1]))?;
        crash::point("line.made");
        let all = self.interfaces()?;
        let index = |name: &str| {
            let found = all.iter().find(|i| i.name == name);
            found.map(|i| i.index).ok_or_else(|| anyhow::anyhow!("the interface {name} just made is gone"))
        };
        let indexes = [index(names[0])?, index(names[1])?];
        for index in indexes {
            self.quiet_up(index, alias)?;
        }
        Ok(indexes)
    }

    /// Brings an interface up, with an alias and without an IPv6 address of its own making.
    fn quiet_up(&mut self, index: u32, alias: &str) -> Result<()> {
        let mut quiet = LinkMessage::default();
        quiet.header.index = index;
        let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        quiet.attributes.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![none])]));
        // Where there is no IPv6 there is nothing to keep quiet.
        if let Err(error) = self.call(RouteNetlinkMessage::SetLink(quiet), NLM_F_ACK) {
            tracing::debug!("keeping interface {index} without IPv6 addresses: {error:#}");
        }
        let mut up = LinkMessage::default();
        up.header.index = index;
        up.header.flags = LinkFlags::Up | LinkFlags::Noarp;
        up.header.change_mask = up.header.flags;
        // The kernel takes it only for a link that is there already (net/core/rtnetlink.c, rtnl_create_link).
        up.attributes.push(LinkAttribute::IfAlias(alias.to_owned()));
        crash::step("line.up")?;
        self.call(RouteNetlinkMessage::SetLink(up), NLM_F_ACK)
            .with_context(|| format!("bringing interface {index} up"))?;
        Ok(())
    }

    /// Removes a link. One that is gone is a success.
    pub fn remove_link(&mut self, index: u32) -> Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        match self.call(RouteNetlinkMessage::DelLink(link), NLM_F_ACK) {
            Err(e) if !is_gone(&e) => Err(e.context(format!("removing interface {index}"))),
            _ => Ok(()),
        }
    }

    /// The qdiscs of an interface.
    pub fn qdiscs(&mut self, index: u32) -> Result<Vec<Qdisc>> {
        let mut message = TcMessage::with_index(index as i32);
        // Without this the kernel keeps defaults such as noqueue to itself (TCA_DUMP_INVISIBLE, Linux 4.13).
        message.attributes.push(TcAttribute::DumpInvisible(true));
        let replies = self
            .call(RouteNetlinkMessage::GetQueueDiscipline(message), NLM_F_DUMP)
            .with_context(|| format!("listing the qdiscs of interface {index}"))?;
        Ok(replies
            .into_iter()
            .filter_map(|reply| match reply {
                RouteNetlinkMessage::NewQueueDiscipline(m) if m.header.index == index as i32 => {
                    Some(qdisc(&m))
                }
                _ => None,
            })
            .collect())
    }

    /// The root qdisc of an interface.
    pub fn root_qdisc(&mut self, index: u32) -> Result<Option<Qdisc>> {
        Ok(self.qdiscs(index)?.into_iter().find(|qdisc| qdisc.parent == TcHandle::ROOT))
    }

    /// Whether the interface has a clsact qdisc.
    pub fn has_clsact(&mut self, index: u32) -> Result<bool> {
        Ok(self.qdiscs(index)?.iter().any(|qdisc| qdisc.kind == "clsact"))
    }

    /// Adds a clsact qdisc.
    pub fn add_clsact(&mut self, index: u32) -> Result<()> {
        let message = clsact(index);
        self.call(RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)
            .with_context(|| format!("adding a clsact qdisc to interface {index}"))?;
        Ok(())
    }

    /// Removes the clsact qdisc, unless it has filters left, which then are not ours.
    pub fn remove_empty_clsact(&mut self, index: u32) -> Result<()> {
        for parent in [FILTERS_INGRESS, FILTERS_EGRESS] {
            if !self.filters_at(index, parent)?.is_empty() {
                return Ok(());
            }
        }
        match self.call(RouteNetlinkMessage::DelQueueDiscipline(clsact(index)), NLM_F_ACK) {
            Err(e) if !is_gone(&e) => {
                Err(e.context(format!("removing the clsact qdisc of interface {index}")))
            }
            _ => Ok(()),
        }
    }

    /// The filters in the clsact qdisc of an interface; none where it has none.
    pub fn filters(&mut self, index: u32) -> Result<Vec<Filter>> {
        let mut found = Vec::new();
        if self.has_clsact(index)? {
            for parent in [FILTERS_INGRESS, FILTERS_EGRESS] {
                found.extend(self.filters_at(index, parent)?.iter().filter_map(filter));
            }
        }
        Ok(found)
    }

    /// Removes a filter. One that is gone, maybe with its interface, is a success.
    pub fn remove_filter(&mut self, filter: &Filter) -> Result<()> {
        let mut message = TcMessage::default();
        message.header = filter.header.clone();
        match self.call(RouteNetlinkMessage::DelTrafficFilter(message), NLM_F_ACK) {
            Err(e) if !is_gone(&e) => Err(e.context(format!("removing the filter {}", filter.name))),
            _ => Ok(()),
        }
    }

    /// The preference with which a new filter for eBPF comes before all others in the clsact qdisc of an interface; 0 where there are
    /// none. The kernel's own choice would not do: it is 49152 also beside a lower one (`tcf_auto_prio`, net/sched/cls_api.c, 6.1).
    pub fn foremost(&mut self, index: u32, way: Direction) -> Result<u16> {
        let parent = match way {
            Direction::Egress => FILTERS_EGRESS,
            Direction::Ingress => FILTERS_INGRESS,
        };
        let all = if self.has_clsact(index)? { self.filters_at(index, parent)? } else { Vec::new() };
        foremost(&all).with_context(|| format!("on interface {index}"))
    }

    fn filters_at(&mut self, index: u32, parent: TcHandle) -> Result<Vec<TcMessage>> {
        let mut message = TcMessage::with_index(index as i32);
        message.header.parent = parent;
        let replies = self
            .call(RouteNetlinkMessage::GetTrafficFilter(message), NLM_F_DUMP)
            .with_context(|| format!("listing the filters of interface {index}"))?;
        Ok(replies
            .into_iter()
            .filter_map(|reply| match reply {
                RouteNetlinkMessage::NewTrafficFilter(message) => Some(message),
                _ => None,
            })
            .collect())
    }

    /// Makes an `sch_fq` that keeps departure times and as many packets the root qdisc of an interface of our own; where it is
    /// that already, changes its limit.
    pub fn set_root_fq(&mut self, index: u32, packets: u32) -> Result<()> {
        let mut message = TcMessage::with_index(index as i32);
        message.header.parent = TcHandle::ROOT;
        message.attributes.push(TcAttribute::Kind("fq".to_owned()));
        message.attributes.push(TcAttribute::Options(fq_options(packets)));
        self.call(RouteNetlinkMessage::NewQueueDiscipline(message), NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE)
            .with_context(|| format!("making sch_fq the root qdisc of interface {index}"))?;
        Ok(())
    }

    /// Sends a request and collects what comes back.
    fn call(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<Vec<RouteNetlinkMessage>> {
        self.sequence += 1;
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0).context("sending to netlink")?;

        let mut replies = Vec::new();
        loop {
            let (bytes, _) = self.socket.recv_from_full().context("receiving from netlink")?;
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let reply = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .context("reading what netlink sent")?;
                let length = (reply.header.length as usize).next_multiple_of(4).clamp(16, rest.len());
                rest = &rest[length..];
                if reply.header.sequence_number != self.sequence {
                    continue;
                }
                match reply.payload {
                    NetlinkPayload::InnerMessage(message) => replies.push(message),
                    NetlinkPayload::Done(_) => return Ok(replies),
                    NetlinkPayload::Error(e) if e.code.is_none() => return Ok(replies),
                    NetlinkPayload::Error(e) => return Err(e.to_io().into()),
                    _ => bail!("netlink lost messages"),
                }
            }
        }
    }
}

/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)` of `linux/pkt_sched.h`.
const FILTERS_INGRESS: TcHandle = TcHandle { major: 0xffff, minor: 0xfff2 };
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_EGRESS)`.
const FILTERS_EGRESS: TcHandle = TcHandle { major: 0xffff, minor: 0xfff3 };

/// What the kernel answers where the thing to be removed is not there.
fn is_gone(error: &anyhow::Error) -> bool {
    let gone = [libc::ENOENT, libc::EINVAL, libc::ENODEV].map(Some);
    error.downcast_ref::<io::Error>().is_some_and(|e| gone.contains(&e.raw_os_error()))
}

fn foremost(filters: &[TcMessage]) -> Result<u16> {
    const ETH_P_ALL: u16 = 3;
    // A packet comes to other chains only by a filter of this one.
    let elsewhere = |a: &TcAttribute| matches!(a, TcAttribute::Chain(chain) if *chain != 0);
    let here = filters.iter().filter(|filter| !filter.attributes.iter().any(elsewhere));
    let Some(first) = here.min_by_key(|filter| filter.header.info >> 16) else { return Ok(0) };
    let kind = first.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind.as_str()),
        _ => None,
    });
    match (first.header.info >> 16) as u16 {
        // Filters of the same kind may share a preference, and a new one comes first there (`cls_bpf_change`, net/sched/cls_bpf.c, 6.1).
        1 if kind == Some("bpf") && first.header.info as u16 == ETH_P_ALL.to_be() => Ok(1),
        preference @ 0..=1 => bail!(
            "a filter of the kind {} has preference {preference}, so none of ours can come before it, and packets may never get to ours; \
             give it another preference",
            kind.unwrap_or("unknown")
        ),
        preference => Ok(preference - 1),
    }
}

fn clsact(index: u32) -> TcMessage {
    let mut message = TcMessage::with_index(index as i32);
    message.header = TcHeader {
        index: index as i32,
        handle: TcHandle { major: 0xffff, minor: 0 },
        parent: TcHandle::CLSACT,
        ..TcHeader::default()
    };
    message.attributes.push(TcAttribute::Kind("clsact".to_owned()));
    message
}

/// Options of `sch_fq` (`linux/pkt_sched.h`, `TCA_FQ_*`): room for everything a delay holds back, a horizon beyond the longest
/// delay, and no pacing of packets that are none of ours.
fn fq_options(packets: u32) -> Vec<TcOption> {
    const PLIMIT: u16 = 1;
    const FLOW_PLIMIT: u16 = 2;
    const RATE_ENABLE: u16 = 5;
    const BUCKETS_LOG: u16 = 8;
    const ORPHAN_MASK: u16 = 10;
    const TIMER_SLACK: u16 = 13;
    const HORIZON: u16 = 14;
    const HORIZON_DROP: u16 = 15;
    let number = |kind: u16, value: u32| TcOption::Other(DefaultNla::new(kind, value.to_ne_bytes().to_vec()));
    vec![
        number(PLIMIT, packets),
        number(FLOW_PLIMIT, packets),
        number(RATE_ENABLE, 0),
        number(BUCKETS_LOG, 14),
        number(ORPHAN_MASK, 0xffff),
        number(TIMER_SLACK, 1_000),
        number(HORIZON, 500_000_000),
        TcOption::Other(DefaultNla::new(HORIZON_DROP, vec![0])),
    ]
}

fn interface(link: &LinkMessage) -> Interface {
    let name = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    });
    let alias = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfAlias(alias) => Some(alias.clone()),
        _ => None,
    });
    let peer = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(index) => Some(*index),
        _ => None,
    });
    let has = |f: fn(&LinkAttribute) -> bool| link.attributes.iter().any(f);
    let vlan = |a: &LinkAttribute| matches!(a, LinkAttribute::LinkInfo(all) if all.contains(&LinkInfo::Kind(InfoKind::Vlan)));
    // With the id of a namespace it is an index of that one.
    let vlan_here = has(vlan) && !has(|a| matches!(a, LinkAttribute::LinkNetNsId(_)));
    let master = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Controller(index) => Some(*index),
        _ => None,
    });
    Interface {
        name: name.unwrap_or_default(),
        alias,
        peer,
        lower: peer.filter(|_| vlan_here),
        master,
        index: link.header.index,
        up: link.header.flags.contains(LinkFlags::Up),
        loopback: link.header.flags.contains(LinkFlags::Loopback),
        link_header: match link.header.link_layer_type {
            LinkLayerType::Ether | LinkLayerType::Loopback => Some(14),
            LinkLayerType::None | LinkLayerType::Ppp | LinkLayerType::Rawip => Some(0),
            _ => None,
        },
    }
}

/// A filter; `None` for the head of a chain, which has no options.
fn filter(message: &TcMessage) -> Option<Filter> {
    // linux/pkt_cls.h.
    const TCA_BPF_NAME: u16 = 7;
    const TCA_BPF_ID: u16 = 11;
    let options = message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    })?;
    let mut found = Filter { header: message.header.clone(), ..Filter::default() };
    for option in options {
        let TcOption::Other(all) = option else { continue };
        let mut bytes = vec![0; all.value_len()];
        all.emit_value(&mut bytes);
        for option in NlasIterator::new(bytes.as_slice()).flatten() {
            match option.kind() {
                TCA_BPF_NAME => {
                    found.name = String::from_utf8_lossy(option.value()).trim_end_matches('\0').to_owned();
                }
                TCA_BPF_ID => found.program = option.value().try_into().map_or(0, u32::from_ne_bytes),
                _ => {}
            }
        }
    }
    Some(found)
}

fn qdisc(message: &TcMessage) -> Qdisc {
    let mut qdisc = Qdisc { kind: String::new(), parent: message.header.parent, packets: 0 };
    for attribute in &message.attributes {
        match attribute {
            TcAttribute::Kind(kind) => qdisc.kind.clone_from(kind),
            TcAttribute::Stats2(stats) => {
                for stat in stats {
                    if let TcStats2::Queue(queue) = stat {
                        qdisc.packets = queue.qlen;
                    }
                }
            }
            _ => {}
        }
    }
    qdisc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_of_ours_comes_before_all_others_or_nowhere() {
        let filter = |preference: u32, protocol: u16, kind: &str, chain: Option<u32>| {
            let mut message = TcMessage::default();
            message.header.info = preference << 16 | u32::from(protocol.to_be());
            message.attributes.push(TcAttribute::Kind(kind.to_owned()));
            message.attributes.extend(chain.map(TcAttribute::Chain));
            message
        };
        let all = |filters: &[TcMessage]| foremost(filters).ok();
        assert_eq!(all(&[]), Some(0));
        assert_eq!(all(&[filter(49152, 3, "bpf", None)]), Some(49151));
        assert_eq!(all(&[filter(9, 3, "u32", Some(0)), filter(7, 0x800, "flower", None)]), Some(6));
        assert_eq!(all(&[filter(2, 3, "bpf", None), filter(1, 3, "bpf", None)]), Some(1));
        assert_eq!(all(&[filter(1, 0x800, "bpf", None)]), None, "of IPv4 only");
        assert_eq!(all(&[filter(1, 3, "u32", None)]), None);
        assert_eq!(all(&[filter(1, 3, "u32", Some(4))]), Some(0), "another chain");
    }
}
