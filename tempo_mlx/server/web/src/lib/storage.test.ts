import { afterEach, expect, it, vi } from 'vitest'
import { inTab } from './storage'

afterEach(() => vi.unstubAllGlobals())

it('what a browser refuses to keep is there for as long as the page is', () => {
  const refuse = () => {
    throw new DOMException('full', 'QuotaExceededError')
  }
  vi.stubGlobal('sessionStorage', { getItem: () => null, setItem: refuse, removeItem: refuse })
  inTab.set('key', 'value')
  expect(inTab.get('key')).toBe('value')
  inTab.remove('key')
  expect(inTab.get('key')).toBe(null)
})
