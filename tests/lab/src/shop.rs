//! The shop: a client, the recommender and its Redis, each in a network namespace of its own.
//!
//! ```text
//! client  shop0 10.77.1.1 ── 10.77.1.2 front0  service  back0 10.77.2.1 ── 10.77.2.2 db0  redis
//! ```

use std::{
    fs::File,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::{Cgroup, Netns, Running, Wire, unique, wait_for};

/// Where the recommender listens.
const SERVICE: ([u8; 4], u16) = ([10, 77, 1, 2], 8080);

/// How a shop is set up.
#[derive(Debug, Clone)]
pub struct ShopOptions {
    /// Goes into its name: `squall-<tag>-<pid>-<n>`.
    pub tag: String,
    /// Directory that has the `recommender`.
    pub binaries: PathBuf,
    /// A defence of the recommender to take away.
    pub defect: Option<String>,
    /// Memory limit of the recommender's cgroup, bytes.
    pub memory: u64,
    /// CPUs that the recommender's cgroup may use, so that whatever burns them leaves some to those who watch.
    pub cpus: f64,
}

/// A running shop. Everything is gone again when it is dropped.
#[derive(Debug)]
pub struct Shop {
    // Dropped in this order: processes first, then what they ran in.
    service: Running,
    redis: Running,
    cgroup: Cgroup,
    client: Netns,
    _service_netns: Netns,
    _redis_netns: Netns,
    name: String,
    dir: tempfile::TempDir,
}

impl Shop {
    /// Sets a shop up, and waits until it answers from Redis.
    pub fn open(options: &ShopOptions) -> Result<Self> {
        let name = unique(&options.tag);
        let dir = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir()?;
        let netns = |part: &str| Netns::new(format!("{name}-{part}"));
        let (client, service_netns, redis_netns) = (netns("client")?, netns("service")?, netns("redis")?);
        let wire = |netns, interface, v4, v6| Wire { netns, interface, v4, v6 };
        Netns::connect(
            wire(&client, "shop0", "10.77.1.1", "fd77:1::1"),
            wire(&service_netns, "front0", "10.77.1.2", "fd77:1::2"),
        )?;
        Netns::connect(
            wire(&service_netns, "back0", "10.77.2.1", "fd77:2::1"),
            wire(&redis_netns, "db0", "10.77.2.2", "fd77:2::2"),
        )?;
        let cgroup = Cgroup::new(&name)?;
        cgroup.limit_memory(options.memory)?;
        cgroup.limit_cpus(options.cpus)?;

        let redis = start_redis(&redis_netns, dir.path())?;
        let mut command = service_netns.command(options.binaries.join("recommender"));
        command.args(["--listen", "10.77.1.2:8080", "--redis", "10.77.2.2:6379", "--name", &name]);
        if let Some(defect) = &options.defect {
            command.args(["--defect", defect]);
        }
        let log = File::create(dir.path().join("recommender.log"))?;
        let service = Running::start_with(
            "recommender",
            &cgroup.wrap(&command),
            Stdio::null(),
            Stdio::null(),
            Stdio::from(log),
        )?;
        let mut shop = Self {
            service,
            redis,
            cgroup,
            client,
            _service_netns: service_netns,
            _redis_netns: redis_netns,
            name,
            dir,
        };
        shop.wait_until_open()?;
        Ok(shop)
    }

    /// Its name: part of the command line of its recommender, and prefix of its namespaces and its cgroup.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the client is: commands that use the shop run here.
    #[must_use]
    pub fn client(&self) -> &Netns {
        &self.client
    }

    /// The cgroup of the recommender.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The recommender.
    pub fn service(&mut self) -> &mut Running {
        &mut self.service
    }

    /// A directory that lasts as long as the shop. The recommender's log is in it.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// One answer of the recommender, as a client gets it: status line, headers and body.
    pub fn ask(&self, user: &str) -> Result<String> {
        const PATIENCE: Duration = Duration::from_secs(10);
        let request =
            format!("GET /recommend?user_id={user} HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n");
        self.client.inside(move || {
            let mut stream = TcpStream::connect_timeout(&SocketAddr::from(SERVICE), PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(request.as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            ensure!(answer.starts_with("HTTP/1.1 "), "not an answer: {answer:?}");
            Ok(answer)
        })
    }

    fn wait_until_open(&mut self) -> Result<()> {
        let log = self.dir.path().join("recommender.log");
        let opened = wait_for("an answer of the recommender out of Redis", Duration::from_secs(30), || {
            self.service.check()?;
            self.redis.check()?;
            Ok(self.ask("U1").ok().filter(|body| body.contains("\"fallback_used\":false")))
        });
        opened.map(drop).with_context(|| {
            format!(
                "the shop did not open; its log says:\n{}",
                std::fs::read_to_string(log).unwrap_or_default()
            )
        })
    }
}

/// Starts a Redis that keeps nothing on disk. Debian's redis-tools has the whole server, under another name: started as
/// `redis-server` it is one, and no package has to start a service on this host.
fn start_redis(netns: &Netns, dir: &Path) -> Result<Running> {
    let server = dir.join("redis-server");
    let tool = ["/usr/bin/redis-check-rdb", "/usr/local/bin/redis-check-rdb"]
        .into_iter()
        .find(|t| Path::new(t).exists());
    symlink(tool.context("there is no Redis here: install redis-tools")?, &server)?;
    let mut command: Command = netns.command(server);
    command.args(["--bind", "10.77.2.2", "--port", "6379", "--save", "", "--appendonly", "no"]);
    command.args(["--protected-mode", "no", "--dir"]).arg(dir);
    let log = File::create(dir.join("redis.log"))?;
    Running::start_with("redis", &command, Stdio::null(), Stdio::from(log), Stdio::null())
}
