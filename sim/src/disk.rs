//! The disk of a simulated node.

use crate::rt::{Executor, Group};
use crate::world::Settings;
use mainstay_io::Media;
use std::sync::Arc;
use std::time::Duration;

pub(crate) struct Disk;
impl Disk {
    pub(crate) fn new(_: &Arc<Executor>, _: &Settings, _: u64) -> Self {
        Self
    }
    pub(crate) fn power_on(&self, _: Group) {}
    pub(crate) fn cut_power(&self) {}
    pub(crate) fn slow(&self, _: Duration) {}
    pub(crate) fn calm(&self) {}
    pub(crate) fn media(&self) -> Arc<dyn Media> {
        todo!()
    }
}
