//! Random numbers and which record is next: pure functions of a seed.
//!
//! # Place
//! under `ycsb`; no clock, no state of a run
//! # Sources
//! Gray et al., "Quickly Generating Billion-Record Synthetic Databases", SIGMOD 1994, section 3.2, for drawing from a Zipf distribution in
//! constant time. Cooper et al., "Benchmarking Cloud Serving Systems with YCSB", SoCC 2010, section 5.1, for the three distributions. The
//! constants of YCSB's ScrambledZipfianGenerator: exponent 0.99, ranks drawn from ten billion.

use crate::cli::Distribution;

/// The exponent that is usual in benchmarks.
const THETA: f64 = 0.99;
/// Ranks that the scrambled distribution draws from, however many records there are: the hottest record is then as hot in a small run as in
/// a large one.
const SCRAMBLED_ITEMS: u64 = 10_000_000_000;
/// Terms of a harmonic number that are added one by one; the rest is an integral.
const TERMS: u64 = 1_000;

/// Splitmix64: the same numbers in every run.
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The numbers of one client. Streams begin far apart.
    pub(super) fn of_client(seed: u64, client: u32) -> Self {
        Self(scatter(scatter(seed).wrapping_add(u64::from(client))))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        finish(self.0)
    }

    /// Below `bound`, which is at least 1.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// From 0 to 1, without 1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// A number for each number, no two the same, without any order.
pub(super) fn scatter(number: u64) -> u64 {
    finish(number.wrapping_add(0x9e37_79b9_7f4a_7c15))
}

fn finish(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Ranks from 0 on, of which rank `r` is drawn about as often as 1 / (r + 1)^0.99 says.
pub(super) struct Zipf {
    items: u64,
    zeta: f64,
    eta: f64,
}

impl Zipf {
    pub(super) fn new(items: u64) -> Self {
        let items = items.max(1);
        let zeta = zeta(items);
        let eta = (1.0 - (2.0 / items as f64).powf(1.0 - THETA)) / (1.0 - zeta_of_two() / zeta);
        Self { items, zeta, eta }
    }

    /// The rank at `unit`, a place from 0 to 1 without 1.
    pub(super) fn rank(&self, unit: f64) -> u64 {
        let place = unit * self.zeta;
        if place < 1.0 {
            return 0;
        }
        if place < zeta_of_two() {
            return 1.min(self.items - 1);
        }
        let rank = self.items as f64 * (self.eta * unit - self.eta + 1.0).powf(1.0 / (1.0 - THETA));
        (rank as u64).min(self.items - 1)
    }
}

fn weight(rank: u64) -> f64 {
    (rank as f64).powf(-THETA)
}

fn zeta_of_two() -> f64 {
    1.0 + weight(2)
}

/// The sum of 1 / i^0.99 over i from 1 to `items`: term by term, and by the formula of Euler and Maclaurin where there are many.
fn zeta(items: u64) -> f64 {
    let head = items.min(TERMS);
    let sum: f64 = (1..=head).map(weight).sum();
    if items == head {
        return sum;
    }
    let (from, to) = (head as f64, items as f64);
    let integral = (to.powf(1.0 - THETA) - from.powf(1.0 - THETA)) / (1.0 - THETA);
    let slopes = THETA * (from.powf(-THETA - 1.0) - to.powf(-THETA - 1.0));
    sum + integral + (weight(items) - weight(head)) / 2.0 + slopes / 12.0
}

/// Draws records.
pub(super) struct Chooser {
    distribution: Distribution,
    /// Over ranks for the scrambled distribution, over the records as of the last draw for the latest.
    zipf: Zipf,
}

impl Chooser {
    pub(super) fn new(distribution: Distribution) -> Self {
        Self { distribution, zipf: Zipf::new(SCRAMBLED_ITEMS) }
    }

    /// One of the records below `known`, which is at least 1.
    pub(super) fn choose(&mut self, numbers: &mut Numbers, known: u64) -> u64 {
        match self.distribution {
            Distribution::Uniform => numbers.below(known),
            Distribution::Zipfian => scatter(self.zipf.rank(numbers.unit())) % known,
            Distribution::Latest => {
                // A thousandth more or fewer records draws alike, and the sum need not be made for each insert.
                let off = self.zipf.items.abs_diff(known);
                if off > known / 1_000 {
                    self.zipf = Zipf::new(known);
                }
                let rank = self.zipf.rank(numbers.unit()).min(known - 1);
                known - 1 - rank
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAWS: u64 = 400_000;

    #[test]
    fn the_sum_is_that_of_its_terms() {
        for items in [1, 2, 999, 1_000, 1_001, 1_002, 50_000, 1_000_000] {
            let terms: f64 = (1..=items).map(weight).sum();
            assert!((zeta(items) / terms - 1.0).abs() < 1e-12, "items={items} {} {terms}", zeta(items));
        }
        // The constant that YCSB has written down for its ten billion.
        assert!((zeta(SCRAMBLED_ITEMS) - 26.469_028_201_783_02).abs() < 1e-6, "{}", zeta(SCRAMBLED_ITEMS));
    }

    #[test]
    fn ranks_are_drawn_as_often_as_the_law_says() {
        for items in [1, 2, 3, 100, 1_000, 100_000] {
            let zipf = Zipf::new(items);
            let mut numbers = Numbers::new(7);
            let mut counts = vec![0u64; items as usize];
            (0..DRAWS).for_each(|_| counts[zipf.rank(numbers.unit()) as usize] += 1);
            // The first two are exact, the others an approximation of the paper's: looked at in sums.
            for (ranks, off) in [(1, 0.03), (2, 0.03), (10, 0.1), (100, 0.1), (1_000, 0.1)] {
                let ranks: u64 = ranks;
                if ranks > items {
                    continue;
                }
                let drawn = counts.iter().take(ranks as usize).sum::<u64>() as f64 / DRAWS as f64;
                let law = zeta(ranks) / zeta(items);
                assert!((drawn / law - 1.0).abs() < off, "items={items} ranks={ranks} drawn={drawn} law={law}");
            }
            assert!(items == 1 || counts[0] > counts[items as usize - 1], "items={items}");
        }
        let zipf = Zipf::new(1_000);
        assert_eq!((zipf.rank(0.0), zipf.rank(1.0 - f64::EPSILON)), (0, 999), "both ends");
    }

    /// Draws of each record.
    fn counted(distribution: Distribution, known: u64) -> Vec<u64> {
        let (mut chooser, mut numbers) = (Chooser::new(distribution), Numbers::of_client(1, 0));
        let mut counts = vec![0; known as usize];
        (0..DRAWS).for_each(|_| counts[chooser.choose(&mut numbers, known) as usize] += 1);
        counts
    }

    #[test]
    fn each_distribution_is_hot_where_it_should_be() {
        let share = |count: u64| count as f64 / DRAWS as f64;
        let uniform = counted(Distribution::Uniform, 100);
        assert!(uniform.iter().all(|count| (share(*count) / 0.01 - 1.0).abs() < 0.1), "{uniform:?}");

        let latest = counted(Distribution::Latest, 1_000);
        let law = 1.0 / zeta(1_000);
        assert!((share(latest[999]) / law - 1.0).abs() < 0.03, "the newest: {} {law}", share(latest[999]));
        assert!(latest[998] > latest[900] && latest[900] > latest[0], "older is colder");

        let zipfian = counted(Distribution::Zipfian, 1_000);
        let mut order: Vec<usize> = (0..1_000).collect();
        order.sort_by_key(|record| std::cmp::Reverse(zipfian[*record]));
        // The hottest is the scattered place of rank 0, and gets what falls on its place of all others besides.
        assert_eq!(order[0] as u64, scatter(0) % 1_000);
        let hottest = share(zipfian[order[0]]);
        assert!((0.036..0.042).contains(&hottest), "{hottest}");
        assert!(zipfian.iter().all(|count| *count > 0), "every record is read at times");
        let near = order[..10].windows(2).filter(|pair| pair[0].abs_diff(pair[1]) == 1).count();
        assert!(near < 3, "hot records are not neighbours: {:?}", &order[..10]);
        // One record, and one that is new.
        for distribution in [Distribution::Uniform, Distribution::Zipfian, Distribution::Latest] {
            let (mut chooser, mut numbers) = (Chooser::new(distribution), Numbers::new(1));
            assert_eq!(chooser.choose(&mut numbers, 1), 0, "{distribution:?}");
            for known in 1..2_000 {
                assert!(chooser.choose(&mut numbers, known) < known, "{distribution:?} known={known}");
            }
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_numbers_and_another_client_others() {
        let first = |seed, client| {
            let mut numbers = Numbers::of_client(seed, client);
            [numbers.next(), numbers.next(), numbers.below(1 << 40)]
        };
        assert_eq!(first(3, 5), first(3, 5));
        assert_ne!(first(3, 5), first(3, 6));
        assert_ne!(first(3, 5), first(4, 5));
        let mut places: Vec<u64> = (0..100_000).map(scatter).collect();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), 100_000, "no two are the same");
    }
}
