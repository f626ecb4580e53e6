//! Word to systemd (sd_notify): a datagram to the socket that `NOTIFY_SOCKET` names.

use std::io;

/// Tells the service manager, where there is one.
///
/// # Errors
/// The socket that the environment names does not answer.
pub fn notify(state: &str) -> io::Result<()> {
    let Some(address) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    send(&address, state)
}

#[cfg(target_os = "linux")]
fn send(address: &std::ffi::OsStr, state: &str) -> io::Result<()> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let bytes = address.as_bytes();
    // A leading @ is a name in the abstract space.
    let to = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(address)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &to).map(|_| ())
}

#[cfg(not(target_os = "linux"))]
fn send(_: &std::ffi::OsStr, _: &str) -> io::Result<()> {
    Ok(())
}
