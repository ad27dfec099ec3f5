use super::*;

fn names() -> [&'static str; 10] {
    ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
}

/// Where the cell of (column, row) begins, found by its frame.
fn cell_corners(picture: &RgbImage) -> Vec<(u32, u32)> {
    let framed = |x: u32, y: u32| picture.get_pixel_checked(x, y) == Some(&FRAME);
    let mut corners = Vec::new();
    for y in 0..picture.height() {
        for x in 0..picture.width() {
            let corner = framed(x, y) && framed(x + 1, y) && framed(x, y + 1) && !framed(x + 1, y + 1);
            if corner && (x == 0 || !framed(x - 1, y)) && (y == 0 || !framed(x, y - 1)) {
                corners.push((x, y));
            }
        }
    }
    corners
}

#[test]
fn each_pixel_is_the_byte_of_its_value_enlarged_three_times() {
    let shape = [20, 1, 28, 28];
    let values: Vec<f32> = (0..20 * 784).map(|i| (i * 37 % 251) as f32 / 125.0 - 1.0).collect();
    let picture = grid(&values, shape, &Column::row_major(&names(), 20), &Caption::default()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("samples.png");
    save_png(&picture, &path).unwrap();
    let read = image::open(&path).unwrap().into_rgb8();
    assert_eq!(read, picture);
    let corners = cell_corners(&read);
    assert_eq!(corners.len(), 20);
    for (image, (x, y)) in corners.into_iter().enumerate() {
        for (py, px) in [(0usize, 0usize), (0, 27), (13, 5), (27, 27)] {
            let expected = Rgb([byte(values[image * 784 + py * 28 + px]); 3]);
            for (dx, dy) in [(0, 0), (2, 2), (1, 0)] {
                let at = (x + 1 + px as u32 * 3 + dx, y + 1 + py as u32 * 3 + dy);
                assert_eq!(*read.get_pixel(at.0, at.1), expected, "image {image} row {py} column {px}");
            }
        }
    }
}

#[test]
fn three_channels_are_red_green_and_blue() {
    let values = [1.0, -1.0, 0.0];
    let columns = Column::row_major(&["one"], 1);
    let picture = grid(&values, [1, 3, 1, 1], &columns, &Caption::default()).unwrap();
    let (x, y) = cell_corners(&picture)[0];
    assert_eq!(*picture.get_pixel(x + 1, y + 1), Rgb([255, 0, 128]));
    assert_eq!(*picture.get_pixel(x + 84, y + 84), Rgb([255, 0, 128]));
}

#[test]
fn latents_are_stretched_and_the_picture_says_so() {
    // Channel 0 is ±1 around 3 (sd 1): 128 ± 51; channel 1 is constant: mid grey; channel 2 is NaN in one place.
    let values: Vec<f32> = vec![2.0, 4.0, 7.0, 7.0, f32::NAN, 0.5, 0.0, 0.0];
    let columns = Column::row_major(&["a"], 1);
    let picture = grid(&values, [1, 4, 1, 2], &columns, &Caption::default()).unwrap();
    let (x, y) = cell_corners(&picture)[0];
    assert_eq!(*picture.get_pixel(x + 1, y + 1), NOT_A_NUMBER);
    assert_eq!(*picture.get_pixel(x + 60, y + 1), Rgb([179, 128, 128]));
    let silent = grid(&values[..6], [1, 3, 1, 2], &columns, &Caption::default()).unwrap();
    assert!(picture.height() > silent.height(), "no line under the grid");
}

#[test]
fn a_title_takes_room_and_is_drawn() {
    let values = vec![0.0; 4];
    let columns = Column::row_major(&["a", "b"], 4);
    let plain = grid(&values, [4, 1, 1, 1], &columns, &Caption::default()).unwrap();
    let caption = Caption { title: Some("DiT".into()), note: Some("cfg 2.0".into()) };
    let titled = grid(&values, [4, 1, 1, 1], &columns, &caption).unwrap();
    assert!(titled.height() > plain.height());
    assert!(titled.rows().take(MARGIN as usize + 13).flatten().any(|p| *p == INK));
}

#[test]
fn images_are_sorted_into_columns_by_class() {
    let columns = Column::by_class(&[2, 0, 2, 2, 9, 0], &["zero", "one", "two"], 2);
    let expected = [("zero", vec![1, 5]), ("two", vec![0, 2]), ("9", vec![4])];
    let got: Vec<(&str, Vec<usize>)> = columns.iter().map(|c| (c.label.as_str(), c.images.clone())).collect();
    assert_eq!(got, expected);
    // Columns of different lengths are drawn, too.
    let picture = grid(&[0.0; 6], [6, 1, 1, 1], &columns, &Caption::default()).unwrap();
    assert_eq!(cell_corners(&picture).len(), 5);
}

/// Values, shape, columns, and words of the error.
type Case<'a> = (&'a [f32], [usize; 4], Vec<Column>, &'a str);

#[test]
fn bad_input_is_refused_by_name() {
    let columns = Column::row_major(&["a"], 1);
    let cases: [Case; 5] = [
        (&[0.0; 3], [1, 1, 2, 2], columns.clone(), "need 4 values, got 3"),
        (&[], [0, 1, 2, 2], columns.clone(), "a size is 0"),
        (&[0.0; 4], [1, 1, 2, 2], vec![], "got 0 columns"),
        (&[0.0; 4], [1, 1, 2, 2], Column::row_major(&["a", "b"], 0), "got 2 columns"),
        (
            &[0.0; 4],
            [1, 1, 2, 2],
            vec![Column { label: "far".into(), images: vec![1] }],
            "`far` asks for image 1",
        ),
    ];
    for (values, shape, columns, words) in cases {
        let error = grid(values, shape, &columns, &Caption::default()).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}
