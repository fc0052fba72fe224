/// <reference types="vitest/config" />
import { svelte } from '@sveltejs/vite-plugin-svelte'
import { defineConfig, loadEnv, type UserConfig } from 'vite'
import { elementBuild, pageBuild } from './build/plugins.ts'

// The same variables as the server's, from the environment or the repository's .env.
const { API_PORT = '8000', FRONTEND_PORT = '5173' } = loadEnv('', '../../..', '')
const api = `http://127.0.0.1:${API_PORT}`
const ROUTES = [
  'settings',
  'health',
  'generate',
  'ask',
  'phrases',
  'sessions',
  'requests',
  'v1',
  'docs',
  'openapi.json',
]

/** `vite build` builds the page, `vite build --mode element` then adds what other pages embed. */
const element: UserConfig = {
  publicDir: false,
  plugins: [svelte(), elementBuild()],
  build: {
    target: 'es2022',
    emptyOutDir: false,
    lib: { entry: 'src/embed/element.ts', formats: ['iife'], name: 'tempoRun', fileName: () => 'tempo-run.js' },
  },
}

const page: UserConfig = {
  base: './',
  plugins: [svelte(), pageBuild()],
  build: {
    target: 'es2022',
    modulePreload: { polyfill: false },
    assetsInlineLimit: 0,
    rolldownOptions: { output: { codeSplitting: false } },
  },
  server: {
    port: Number(FRONTEND_PORT),
    strictPort: true,
    proxy: Object.fromEntries(ROUTES.map((route) => [`/${route}`, api])),
  },
  test: { include: ['src/**/*.test.ts'], environment: 'node' },
}

export default defineConfig(({ mode }) => (mode === 'element' ? element : page))
