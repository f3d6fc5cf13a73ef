"""Vulkan devices of this machine with their drivers' versions, asked of the system's loader.

ctypes alone: vulkaninfo is often not installed, and SAPIEN names devices without drivers.
"""

import ctypes
import ctypes.util
import re
from dataclasses import dataclass

_KINDS = ("other", "integrated GPU", "discrete GPU", "virtual GPU", "CPU")
_INSTANCE, _PROPERTIES, _DRIVER = 1, 1000059001, 1000196000  # Vulkan's names of structures
_VULKAN_1_2 = 1 << 22 | 2 << 12  # the first that tells a driver's own version


class _Application(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),  # 0
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("version", ctypes.c_uint32),
        ("engine", ctypes.c_char_p),
        ("engine_version", ctypes.c_uint32),
        ("api", ctypes.c_uint32),
    )


class _InstanceInfo(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("next", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("application", ctypes.POINTER(_Application)),
        ("layer_count", ctypes.c_uint32),
        ("layers", ctypes.c_void_p),
        ("extension_count", ctypes.c_uint32),
        ("extensions", ctypes.c_void_p),
    )


class _Driver(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("next", ctypes.c_void_p),
        ("id", ctypes.c_uint32),
        ("name", ctypes.c_char * 256),
        ("info", ctypes.c_char * 256),
        ("conformance", ctypes.c_uint8 * 4),
    )


class _Properties(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("next", ctypes.POINTER(_Driver)),
        ("api", ctypes.c_uint32),
        ("driver", ctypes.c_uint32),
        ("vendor", ctypes.c_uint32),
        ("device", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
        ("name", ctypes.c_char * 256),
        ("rest", ctypes.c_char * 1024),  # cache id, limits: not needed
    )


@dataclass(frozen=True)
class Device:
    """A device by name and kind; its driver as that calls itself: "Mesa 25.0.7 (LLVM 15.0.6)"."""

    name: str
    kind: str
    driver: str

    @property
    def old_mesa(self) -> bool:
        """Whether its driver is Mesa from before version 25, which cannot run SAPIEN."""
        found = re.match(r"Mesa (\d+)", self.driver)
        return found is not None and int(found[1]) < 25

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}), driver {self.driver}"


def devices() -> list[Device]:
    """All devices. Raises RuntimeError that says what is missing: loader, driver or device."""
    name = ctypes.util.find_library("vulkan")
    if name is None:
        raise RuntimeError("no Vulkan loader (libvulkan.so.1)")
    vulkan = ctypes.CDLL(name)
    application = _Application(api=_VULKAN_1_2)
    info = _InstanceInfo(type=_INSTANCE, application=ctypes.pointer(application))
    instance = ctypes.c_void_p()
    status = vulkan.vkCreateInstance(ctypes.byref(info), None, ctypes.byref(instance))
    if status:
        raise RuntimeError(f"no Vulkan driver (vkCreateInstance says {status})")
    try:
        count = ctypes.c_uint32()
        vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
        handles = (ctypes.c_void_p * count.value)()
        vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), handles)
        found = [_device(vulkan, handle) for handle in handles]
    finally:
        vulkan.vkDestroyInstance(instance, None)
    if not found:
        raise RuntimeError("no Vulkan device")
    return found


def _device(vulkan: ctypes.CDLL, handle: int) -> Device:
    driver = _Driver(type=_DRIVER)
    properties = _Properties(type=_PROPERTIES, next=ctypes.pointer(driver))
    vulkan.vkGetPhysicalDeviceProperties2(ctypes.c_void_p(handle), ctypes.byref(properties))
    kind = _KINDS[properties.kind] if properties.kind < len(_KINDS) else "other"
    return Device(properties.name.decode(), kind, driver.info.decode() or driver.name.decode())
