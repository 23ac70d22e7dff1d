//! The CPU engines over the corpus: f32 on gemm and rayon against the f64 oracle, and the model of the kernels'
//! rounding, which must be a tight tolerance. One test a variant.

use dsv_reference::attention::{View, tiled};
use dsv_reference::compare::all_passed;
use dsv_spec::Dtype;
use dsv_tests::corpus::{Values, Variant, variants};
use dsv_tests::engines::{Lowp, Oracle, compare_grads, compare_output, lines, widen_for_sequential_logits};
use dsv_tests::inputs::Inputs;
use libtest_mimic::{Arguments, Failed, Trial};

fn main() {
    let tests = variants()
        .into_iter()
        .filter(|variant| !variant.case.gpu_only)
        .map(|variant| Trial::test(format!("reference/{}", variant.name()), move || run(&variant)))
        .collect();
    libtest_mimic::run(&Arguments::from_args(), tests).exit();
}

fn run(variant: &Variant) -> Result<(), Failed> {
    let inputs = Inputs::of(variant);
    let oracle = Oracle::of(&inputs)?;

    // The f32 engine, with the tolerance of f32.
    let (attn, lists) = (inputs.attn(), inputs.lists());
    let single = Lowp::of(&inputs, Dtype::F32, 64)?;
    let output = tiled::forward(&inputs.shape, &attn, lists.as_ref())?;
    let grads = tiled::backward(
        &inputs.shape,
        &attn,
        lists.as_ref(),
        &View::new(&output.out, inputs.shape.q_layout()),
        &output.lse,
        &inputs.d_out(),
        inputs.d_lse.as_deref(),
    )?;
    let mut results = compare_output(&inputs, &oracle, &single, &output);
    results.extend(compare_grads(&inputs, &oracle, &single.grads(&inputs)?, &grads));
    let far = matches!(variant.case.values, Values::Up | Values::Down);
    // Products of bf16 have 16 bits: sums of up to 128 of them round little even at these logits.
    let inexact = variant.case.dtype == Dtype::F16 || variant.head_dim > 128;
    if far || (variant.case.values == Values::X16 && inexact) {
        results = widen_for_sequential_logits(&inputs, results);
    }
    all_passed(&results)?;

    // What the kernels' tolerance is worth: a share of the largest value.
    let model = Lowp::of(&inputs, variant.case.dtype, 64)?;
    let mut results = compare_output(&inputs, &oracle, &model, &model.output);
    let model_grads = model.grads(&inputs)?;
    results.extend(compare_grads(&inputs, &oracle, &model_grads, &model_grads.grads));
    all_passed(&results)?;
    // A key's column of 90 times the rest multiplies dS's rounding.
    let worth = if far { 0.6 } else { 0.04 };
    for result in &results {
        // Nothing is left of a gradient that is exactly zero but rounding.
        if result.max_reference > 1e-6 && result.max_allowed > worth * result.max_reference {
            return Err(format!(
                "the tolerance of {} is {:.1e} of its largest value; allowed: {worth}\n{}",
                result.name,
                result.max_allowed / result.max_reference,
                lines(&results)
            )
            .into());
        }
    }
    Ok(())
}
