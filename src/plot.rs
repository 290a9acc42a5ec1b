//! Line plots as SVG.

use plotters::prelude::*;

use crate::{Error, Result};

/// Lines on one pair of axes, with a y axis from 0 to at least 1, for accuracies. A series has a name and points.
///
/// Returns the text of an SVG file. Points that are not finite are left out; without points the axes are empty.
pub fn lines(
    title: &str,
    x_label: &str,
    y_label: &str,
    series: &[(String, Vec<(f64, f64)>)],
) -> Result<String> {
    let finite = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
        points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect()
    };
    let all: Vec<(f64, f64)> = series.iter().flat_map(|(_, points)| finite(points)).collect();
    let (left, right) =
        all.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, r), (x, _)| (l.min(*x), r.max(*x)));
    let (left, right) = if left < right { (left.min(0.0), right) } else { (0.0, right.max(1.0)) };
    let top = all.iter().fold(1.0, |top: f64, (_, y)| top.max(*y));
    let mut svg = String::new();
    let draw = |svg: &mut String| -> std::result::Result<(), Box<dyn std::error::Error>> {
        let root = SVGBackend::with_string(svg, (720, 480)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(52)
            .build_cartesian_2d(left..right, 0.0..top)?;
        chart.configure_mesh().x_desc(x_label).y_desc(y_label).light_line_style(WHITE).draw()?;
        for (i, (name, points)) in series.iter().enumerate() {
            let colour = Palette99::pick(i).to_rgba();
            chart
                .draw_series(LineSeries::new(finite(points), colour.stroke_width(2)))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerLeft)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.2))
            .draw()?;
        root.present()?;
        Ok(())
    };
    draw(&mut svg).map_err(|e| Error::Alarm(format!("the plot '{title}' cannot be drawn: {e}")))?;
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_holds_its_title_its_names_and_a_line_a_series() {
        let series = [
            ("one".to_owned(), vec![(0.0, 1.0), (1.0, 0.5)]),
            ("two".to_owned(), vec![(0.0, 0.25), (0.5, 0.75), (2.0, f64::NAN)]),
        ];
        let svg = lines("Robust accuracy", "steps", "accuracy", &series).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for text in ["Robust accuracy", "steps", "accuracy", "one", "two"] {
            assert!(svg.contains(text), "{text}");
        }
        // A series is a line, and one more in the legend.
        let drawn = |svg: &str| svg.matches("<polyline").count();
        let without = lines("Robust accuracy", "steps", "accuracy", &series[..1]).unwrap();
        assert_eq!(drawn(&svg), drawn(&without) + 2);
        assert_eq!(lines("Robust accuracy", "steps", "accuracy", &series).unwrap(), svg);
    }

    #[test]
    fn nothing_to_show_is_an_empty_plot() {
        assert!(lines("", "", "", &[]).unwrap().contains("<svg"));
    }
}
