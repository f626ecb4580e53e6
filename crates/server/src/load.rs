//! A load test against a running server.
