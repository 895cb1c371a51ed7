//! mainstay-c
