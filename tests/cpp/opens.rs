// SPDX-License-Identifier: Apache-2.0
//! Opens a bundle through the C ABI, describes it, and is told why another folder is none.

use std::ffi::{c_char, c_int, c_void, CStr, CString};

#[link(name = "freewheel")]
extern "C" {
    fn freewheel_version() -> *const c_char;
    fn freewheel_status_name(status: c_int) -> *const c_char;
    fn freewheel_model_create(
        folder: *const c_char,
        options: *const c_void,
        model: *mut *mut c_void,
    ) -> c_int;
    fn freewheel_model_describe(model: *mut c_void, json: *mut *const c_char) -> c_int;
    fn freewheel_model_last_error(model: *const c_void) -> *const c_char;
    fn freewheel_model_destroy(model: *mut c_void);
}

fn text(pointer: *const c_char) -> String {
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

fn main() {
    println!("version {}", text(unsafe { freewheel_version() }));
    for folder in std::env::args().skip(1) {
        let name = CString::new(folder).unwrap();
        let mut model = std::ptr::null_mut();
        let status = unsafe { freewheel_model_create(name.as_ptr(), std::ptr::null(), &mut model) };
        print!("{}: ", text(unsafe { freewheel_status_name(status) }));
        let mut json = std::ptr::null();
        if status == 0 && unsafe { freewheel_model_describe(model, &mut json) } == 0 {
            println!("{}", text(json));
        } else {
            println!("{}", text(unsafe { freewheel_model_last_error(model) }));
        }
        unsafe { freewheel_model_destroy(model) };
    }
}
