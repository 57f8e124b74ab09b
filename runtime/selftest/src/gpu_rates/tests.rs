use super::*;
use tier_plan_cuda::shim;
use tier_plan_formats::model::spec::Activation;

const LITTLE: Effort = Effort {
    bytes: 1 << 16,
    passes: 1,
    launches: 3,
    stages: 2,
};

/// Host memory of the GPU emulator.
struct Host(Vec<u8>);

impl HostMemory for Host {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn send(&mut self, to: View<'_>) -> Result<(), CudaError> {
        to.write(&self.0)
    }

    fn receive(&mut self, from: View<'_>) -> Result<(), CudaError> {
        from.read(&mut self.0)
    }
}

fn subject() -> Subject {
    let pinned = Box::new(Host(vec![3; LITTLE.bytes]));
    Subject {
        device: shim::shared(),
        multiprocessors: 1,
        pinned,
        effort: LITTLE,
    }
}

#[test]
fn a_device_is_measured_from_end_to_end() {
    let mut subject = subject();
    let r = measure_rates(&mut subject).unwrap();
    let links = [r.to_device, r.from_device].map(|link| [link.pinned_gbps, link.pageable_gbps]);
    for value in [r.launch_us, r.round_trip_us, r.read_gbps]
        .into_iter()
        .chain(links.into_iter().flatten())
    {
        assert!(value.is_finite() && value > 0.0, "{r:?}");
    }
    let copied = copy_gbps(&subject.device, LITTLE).unwrap();
    assert!(copied.is_finite() && copied > 0.0, "{copied}");
    let mut passes = 0;
    let mut beside = || {
        passes += 1;
        if passes == 1 { 84.0 } else { 42.0 }
    };
    let both = contended(&mut subject, &mut beside).unwrap();
    assert!(both.to_device_gbps > 0.0 && both.beside == 42.0, "{both:?}");
    assert_eq!((both.alone, both.kept()), (84.0, 0.5));
    assert_eq!(passes, 2);
}

#[test]
fn experts_are_measured() {
    let subject = subject();
    let q4 = TensorType::Q4_0;
    let activation = Activation::Silu;
    let kind = ExpertKind {
        n_expert: 6,
        hidden: 64,
        ffn: 32,
        gate: Some(q4),
        up: q4,
        down: TensorType::F32,
        activation,
        weigh_input: false,
    };
    let measured = experts(&subject, kind, 2).unwrap().unwrap();
    assert_eq!(
        (measured.expert_bytes, measured.used),
        (2 * 64 * 32 / 32 * 18 + 4 * 64 * 32, 2)
    );
    assert!(
        measured.token_us > 0.0 && measured.batch_gflops > 0.0,
        "{measured:?}"
    );
    assert_eq!(
        experts(&subject, kind, 7).unwrap(),
        None,
        "a token can't use more than there are"
    );
    // A third less to read without a gate.
    let up_only = ExpertKind {
        gate: None,
        activation: Activation::SquaredRelu,
        ..kind
    };
    let measured = experts(&subject, up_only, 2).unwrap().unwrap();
    assert_eq!(measured.expert_bytes, 64 * 32 / 32 * 18 + 4 * 64 * 32);
    let unsupported = ExpertKind { hidden: 63, ..kind };
    assert_eq!(experts(&subject, unsupported, 2).unwrap(), None);
}

#[test]
fn matvecs_are_measured_for_every_format() {
    let device: Arc<dyn Device> = shim::shared();
    for ty in TensorType::ALL {
        let rate = matvecs(
            &device,
            ty,
            Effort {
                bytes: 3000,
                ..LITTLE
            },
            2,
            256,
        )
        .unwrap();
        assert!(rate > 0.0 && rate.is_finite(), "{ty}: {rate}");
    }
}

#[test]
fn a_copy_within_a_device_copies_the_bytes() {
    let counting = Arc::new(crate::counting::CountingDevice::new(shim::shared()));
    let devices: [Arc<dyn Device>; 2] = [shim::shared(), counting];
    for device in devices {
        let bytes: Vec<u8> = (0..1000).map(|i| (i % 251) as u8).collect();
        let (from, to) = (
            Buffer::of_bytes(&device, &bytes).unwrap(),
            Buffer::new(&device, 500).unwrap(),
        );
        to.view().copy_from(from.view().part(300..800)).unwrap();
        assert_eq!(to.view().to_bytes().unwrap(), bytes[300..800]);
        to.view()
            .part(0..0)
            .copy_from(from.view().part(0..0))
            .unwrap();
    }
}

#[test]
fn memory_is_read_to_the_end() {
    let device: Arc<dyn Device> = shim::shared();
    let ops = Ops::new(Arc::clone(&device));
    ops.nothing().unwrap();
    let words: Vec<i32> = (1..=400).collect();
    let memory = Buffer::of_i32(&device, &words).unwrap();
    let sums = Buffer::new_f32(&device, 256).unwrap();
    ops.read_all(memory.view(), 1, sums.view()).unwrap();
    let xor: i64 = sums
        .view()
        .to_i32()
        .unwrap()
        .into_iter()
        .map(i64::from)
        .sum();
    let expected: i64 = words
        .chunks(4)
        .map(|w| i64::from(w[0] ^ w[1] ^ w[2] ^ w[3]))
        .sum();
    assert_eq!(xor, expected);
}
