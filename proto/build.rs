//! Compiles the .proto files without a system `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let descriptors = protox::compile(["squall/v1/agent.proto"], ["."])?;
    println!("cargo::rerun-if-changed=squall");
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
