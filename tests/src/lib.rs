//! mainstay-tests
