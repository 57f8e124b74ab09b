//! Machine code of the kernels' modules for one GPU: from the cache on disk, or compiled.
//!
//! A model's first pass wants several modules, one after the other, and a compiler takes up to four seconds
//! for one. So the first that is missing has all compiled that are, on every processor.

use super::nvrtc::Compiler;
use super::source::{MODULES, Module};
use super::{CudaError, Version, kernel_cache};
use std::collections::{HashMap, HashSet};
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use tier_plan_formats::safely;
use tier_plan_kernels::scoped::spawn_or_run;

/// Machine code of modules for one GPU.
pub(super) struct KernelImages {
    capability: Version,
    /// Version of the driver's interface, as the driver numbers it.
    driver: i32,
    compiler: Option<Compiler>,
    /// Names of the modules that were found or compiled.
    known: HashSet<&'static str>,
    /// What was compiled and is not in the cache on disk.
    kept: HashMap<&'static str, Vec<u8>>,
}

impl KernelImages {
    /// Has modules compiled for a GPU of this compute capability, and for its driver.
    pub(super) fn new(capability: Version, driver: i32) -> Self {
        Self {
            capability,
            driver,
            compiler: None,
            known: HashSet::new(),
            kept: HashMap::new(),
        }
    }

    /// Returns the version of the compiler, if one was needed.
    pub(super) fn compiler_version(&self) -> Option<Version> {
        self.compiler.as_ref().map(Compiler::version)
    }

    /// Returns a module's machine code from the cache on disk, or as it was compiled before.
    pub(super) fn find(&mut self, module: &'static Module) -> Option<Vec<u8>> {
        let image = self.kept.remove(module.name).or_else(|| {
            let path = kernel_cache::path(module, self.capability, self.driver)?;
            kernel_cache::unseal(&std::fs::read(path).ok()?)
        });
        self.known.extend(image.is_some().then_some(module.name));
        image
    }

    /// Compiles a module, and beside it all others that were not [found](Self::find) yet.
    ///
    /// # Errors
    /// When there is no compiler, or the module does not compile. What is wrong with others is said when
    /// they are wanted.
    pub(super) fn compile(&mut self, wanted: &'static Module) -> Result<Vec<u8>, CudaError> {
        let is_missing = |module: &&Module| {
            let path = kernel_cache::path(module, self.capability, self.driver);
            let is_there = path.is_some_and(|path| path.is_file());
            module.name != wanted.name && !is_there && !self.known.contains(module.name)
        };
        let others = MODULES.iter().filter(is_missing);
        let modules: Vec<&Module> = std::iter::once(wanted).chain(others).collect();
        let compiler = match self.compiler.take() {
            Some(compiler) => compiler,
            None => Compiler::find_for(self.driver / 1000)?,
        };
        let compile = |module: &'static Module| {
            let image = compiler.compile(module, self.capability)?.image;
            Ok((self.cache(module, &image), image))
        };
        let mut compiled = on_all_processors(&modules, compile).into_iter();
        let first = compiled.next();
        self.known.insert(wanted.name);
        for (module, compiled) in modules[1..].iter().zip(compiled) {
            let Ok((is_cached, image)) = compiled else {
                continue;
            };
            self.known.insert(module.name);
            if !is_cached {
                self.kept.insert(module.name, image);
            }
        }
        self.compiler = Some(compiler);
        let Some(first) = first else {
            unreachable!("the module that is wanted is among those that are compiled")
        };
        first.map(|(_, image)| image)
    }

    /// Writes machine code to the cache on disk, and returns whether it is there. A cache that can't be
    /// written only costs time at the next start.
    fn cache(&self, module: &Module, image: &[u8]) -> bool {
        let Some(path) = kernel_cache::path(module, self.capability, self.driver) else {
            return false;
        };
        let folder = path.parent().map_or(Ok(()), std::fs::create_dir_all);
        folder.is_ok() && safely::write(&path, &kernel_cache::seal(image)).is_ok()
    }
}

/// Calls a function for each item, on as many threads as there are processors for this process. Returns
/// the results in the order of the items.
fn on_all_processors<T: Copy + Sync, R: Send>(items: &[T], call: impl Fn(T) -> R + Sync) -> Vec<R> {
    let n_threads = thread::available_parallelism().map_or(1, NonZero::get);
    let next = AtomicUsize::new(0);
    let take = || {
        let item = || {
            let at = next.fetch_add(1, Ordering::Relaxed);
            items.get(at).map(|item| (at, call(*item)))
        };
        std::iter::from_fn(item).collect::<Vec<_>>()
    };
    let mut results: Vec<(usize, R)> = thread::scope(|scope| {
        let threads: Vec<_> = (1..n_threads.min(items.len()))
            .map(|_| spawn_or_run(scope, take))
            .collect();
        let mut results = take();
        for thread in threads {
            match thread.join() {
                Ok(more) => results.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        results
    });
    results.sort_unstable_by_key(|(at, _)| *at);
    results.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_have_the_order_of_the_items() {
        for n in [0, 1, 2, 7, 100] {
            let items: Vec<usize> = (0..n).collect();
            let squares = on_all_processors(&items, |n| n * n);
            assert_eq!(squares, items.iter().map(|n| n * n).collect::<Vec<_>>());
        }
    }
}
