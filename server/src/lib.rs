//! mainstay-server
